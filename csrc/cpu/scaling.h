// Numbers scaled and capped where they lie. See minivllm/ops/scaling.py.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "types.h"

namespace minivllm {

struct ScalingKernels {
    // x: n contiguous numbers; each becomes factor * x.
    void (*scale)(DType dtype, void* x, int64_t n, float factor);
    // x becomes cap * tanh(x / cap).
    void (*soft_cap)(DType dtype, void* x, int64_t n, float cap);
};
MINIVLLM_KERNELS(ScalingKernels, scaling_kernels)

}  // namespace minivllm
