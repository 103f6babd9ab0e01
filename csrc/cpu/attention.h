// What paged attention is given. See minivllm/ops/paged_attention.py for the meaning and the promises.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "kv_layout.h"
#include "kv_write.h"
#include "types.h"

namespace minivllm {

constexpr int64_t kNoWindow = INT64_MAX;

struct Attention {
    void* out;             // [num_tokens, num_heads, head_dim]
    const void* q;         // the same, with the strides below, in elements
    const char* kv_cache;  // as `layout` says
    KvLayout layout;
    const int32_t* block_table;      // [num_reqs, max_blocks], rows block_table_stride apart
    const int32_t* seq_lens;         // [num_reqs]
    const int32_t* query_start_loc;  // [num_reqs + 1]
    DType dtype;                     // of q and out
    int64_t num_heads, q_token_stride, q_head_stride;
    int64_t num_reqs, block_table_stride;

    float scale;
    float k_scale, v_scale;  // what fp8 codes count in
    int64_t sliding_window;  // a row sees at most so many positions, its own included
    float softcap;           // scores are softcap * tanh(score / softcap); 0: as they are
    const float* sinks;      // [num_heads], a logit that takes part in the softmax with no value; or null
    const float* alibi;      // [num_heads], a score gets so much × (key position - query position); or null

    // Groups of requests of one query row each whose leading tokens lie in the same blocks: group g's requests are
    // members[group_starts[g]] … [group_starts[g + 1]), and its first shared_lens[g] positions are theirs in common.
    int64_t num_groups, num_members;
    const int32_t *members, *group_starts, *shared_lens;

    const KvWrite* write;  // the rows' own keys and values, if they are still to be written; or null
};

// Positions a row's maximum, sum and output move by at once: 4 tiles. Shared parts end at a multiple.
constexpr int64_t kStep = 128;
constexpr int64_t kSegment = 1024;  // positions

struct AttentionKernels {
    void (*run)(const Attention&);
};
MINIVLLM_KERNELS(AttentionKernels, attention_kernels)

}  // namespace minivllm
