// Rotary embedding and the cache write of what comes of it, in one pass. See minivllm/ops/rotary_kv_write.py.
#pragma once

#include "dispatch.h"
#include "kv_write.h"
#include "rotary.h"

namespace minivllm {

struct RotaryKvWriteKernels {
    // q is turned in place; k is only read, and what it becomes is written as `write` says, whose own k is not looked at.
    void (*run)(const Heads& q, const Heads& k, const KvWrite& write, float eps, const int64_t* positions,
                const float* cos_sin, int64_t rot_dim);
};
MINIVLLM_KERNELS(RotaryKvWriteKernels, rotary_kv_write_kernels)

}  // namespace minivllm
