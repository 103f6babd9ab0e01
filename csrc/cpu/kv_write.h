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

struct KvWriteKernels {
    void (*run)(const KvWrite&);
};
MINIVLLM_KERNELS(KvWriteKernels, kv_write_kernels)

}  // namespace minivllm
