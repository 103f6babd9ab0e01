#pragma once

#include <cstdint>

#include "dispatch.h"
#include "types.h"

namespace minivllm {

struct ActivationKernels {
    // out: [rows, width] contiguous = act(gate) * up; a row of gate_up is [gate (width), up (width)].
    using GatedMul = void (*)(DType dtype, void* out, const void* gate_up, int64_t row_stride, int64_t rows, int64_t width);
    GatedMul silu_mul, gelu_tanh_mul;
};
MINIVLLM_KERNELS(ActivationKernels, activation_kernels)

}  // namespace minivllm
