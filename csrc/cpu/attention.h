// What paged attention is given. See minivllm/ops/paged_attention.py for the meaning and the promises.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "types.h"

namespace minivllm {

struct Attention {
    void* out;             // [num_tokens, num_heads, head_dim]
    const void* q;         // the same, with the strides below, in elements
    const void* kv_cache;  // [num_blocks, 2, num_kv_heads, block_size, head_dim]
    const int32_t* block_table;      // [num_reqs, max_blocks], rows block_table_stride apart
    const int32_t* seq_lens;         // [num_reqs]
    const int32_t* query_start_loc;  // [num_reqs + 1]
    DType dtype;
    int64_t num_heads, head_dim, q_token_stride, q_head_stride;
    int64_t num_kv_heads, block_size;
    int64_t num_reqs, block_table_stride;
    float scale;
    int64_t sliding_window;  // a row sees at most so many positions, its own included
};

constexpr int64_t kKvTile = 32;     // positions; block_size is a multiple
constexpr int64_t kSegment = 1024;  // positions
constexpr int64_t kHeadDimStep = 16;

struct AttentionKernels {
    void (*run)(const Attention&);
};
MINIVLLM_KERNELS(AttentionKernels, attention_kernels)

}  // namespace minivllm
