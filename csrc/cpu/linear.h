#pragma once

#include <cstdint>

#include "dispatch.h"
#include "types.h"

namespace minivllm {

// y[m][n] = Σ_k x[m][k]·w[n][k] + bias[n]. Rows contiguous; strides in elements.
struct LinearCall {
    DType dtype;  // of x and of the packed weight
    int64_t m, n, k;
    const void* x;
    int64_t x_stride;
    const void* packed;
    const void* bias;  // [n], or null
    DType bias_dtype;
    void* out;  // [m, n] contiguous
    DType out_dtype;
};

// Rows [start, start + rows) of a weight, to be packed.
struct WeightRows {
    DType dtype;  // of the packed weight
    int64_t k, start, rows;
    const void* source;
    DType source_dtype;
    int64_t source_stride;
};

struct LinearKernels {
    int64_t (*packed_bytes)(DType dtype, int64_t n, int64_t k);
    void (*load_rows)(void* packed, const WeightRows& rows);
    void (*gather_rows)(DType dtype, void* out, const void* packed, int64_t k, const int64_t* ids, int64_t num_ids);
    void (*multiply)(const LinearCall& call);
};
MINIVLLM_KERNELS(LinearKernels, linear_kernels)

}  // namespace minivllm
