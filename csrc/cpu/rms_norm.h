#pragma once

#include <cstdint>

#include "dispatch.h"
#include "types.h"

namespace minivllm {

// Rows x[i][j], i < outer, j < inner, each of `hidden` contiguous elements; strides in elements.
struct RmsNormRows {
    int64_t outer, inner, hidden;
    int64_t x_outer_stride, x_inner_stride;
    int64_t residual_outer_stride, residual_inner_stride;  // add_rms_norm only
};

struct RmsNormKernels {
    // out: [outer, inner, hidden] contiguous; residual null, or changed in place to residual + x and normed.
    // weight: of `dtype`, or float32: then the product is rounded, not the normed value before it.
    void (*run)(DType dtype, void* out, const void* x, void* residual, const void* weight, DType weight_dtype,
                const RmsNormRows& rows, float eps);
};
MINIVLLM_KERNELS(RmsNormKernels, rms_norm_kernels)

}  // namespace minivllm
