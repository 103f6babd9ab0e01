#pragma once

#include <cstdint>

#include "dispatch.h"
#include "types.h"

namespace minivllm {

// Rows x[i][j], i < outer, j < inner, each of `hidden` contiguous elements; strides in elements.
struct RmsNormRows {
    int64_t outer, inner, hidden;
    int64_t outer_stride, inner_stride;
};

struct RmsNormKernels {
    // out: [outer, inner, hidden] contiguous.
    void (*run)(DType dtype, void* out, const void* x, const void* weight, const RmsNormRows& rows, float eps);
};
MINIVLLM_KERNELS(RmsNormKernels, rms_norm_kernels)

}  // namespace minivllm
