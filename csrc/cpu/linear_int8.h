#pragma once

#include "linear.h"

namespace minivllm {

// Linear layers with int8 weights (one scale an output feature) and activations made int8 row by row. The sums are
// int32 and exact; float(sum) × (row's scale × feature's scale) is what `LinearCall` calls the sum. `dtype` is x's.
struct Int8LinearKernels {
    int64_t (*packed_bytes)(int64_t n, int64_t k, bool interleaved);
    void (*load_rows)(void* packed, const WeightRows& rows);  // any float type; whole rows of K
    // out: [num_ids, k] of `dtype`: the rows, dequantised.
    void (*gather_rows)(DType dtype, void* out, const void* packed, int64_t n, int64_t k, const int64_t* ids,
                        int64_t num_ids);
    void (*multiply)(const LinearCall& call);
};
MINIVLLM_KERNELS(Int8LinearKernels, int8_linear_kernels)

}  // namespace minivllm
