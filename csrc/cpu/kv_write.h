// What writing into the KV cache is given. See minivllm/ops/kv_write.py.
#pragma once

#include "dispatch.h"
#include "kv_layout.h"
#include "types.h"

namespace minivllm {

struct KvWrite {
    char* cache;
    KvLayout layout;
    const char *k, *v;  // [num_tokens, num_kv_heads, head_dim] with the strides below, in bytes
    const int64_t* slots;
    DType dtype;  // of k and v
    int64_t num_tokens, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    float k_scale, v_scale;  // of fp8
};

// Whether a step of so many tokens leaves its keys and values to attention, which reads their lines anyway and has them
// written there: a decode's key touches a line for each pair of dimensions. Where a kernel computes them and where
// attention is given them, both ask here.
inline bool is_left_to_attention(const KvLayout& layout, int64_t num_tokens) {
    return layout.type == KvType::bf16 && num_tokens > 1 && num_tokens <= 64;
}

// Throws where the layout is none, or a slot lies outside a cache of so many blocks: nothing has been written then.
void check(const KvWrite& write, int64_t num_blocks);

struct KvWriteKernels {
    void (*run)(const KvWrite&);
    void (*rows)(const KvWrite&, int64_t begin, int64_t end);  // tokens [begin, end), on the calling thread
    // The same of one head. What k and v point to is its first row; one of them may be null, and is not written.
    void (*head_rows)(const KvWrite&, int64_t head, int64_t begin, int64_t end);
};
MINIVLLM_KERNELS(KvWriteKernels, kv_write_kernels)

}  // namespace minivllm
