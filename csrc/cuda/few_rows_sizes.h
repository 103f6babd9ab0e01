// What a launch of the product of few rows is told. Plain C++.
#pragma once

#include <cstdint>

namespace minivllm::cuda {

enum class WeightType : int { bf16 = 0, f16 = 1, int8 = 2, fp8 = 3 };
enum class Epilogue : int { store = 0, add_residual = 1, silu_mul = 2 };

constexpr int kMostRows = 16;

// Strides of x and of the weight are in bytes, multiples of 16 as their addresses; of out and addend in elements.
struct FewRows {
    void* out;                  // [num_rows, out_features], rows contiguous; what is added to, for add_residual
    const char* x;              // [num_rows, in_features] of the weight's type
    const char* weight;         // [out_features, in_features]; for silu_mul gate's rows, then as many of up
    const void* bias;           // of `is_bf16`'s type, one for each of the weight's rows, or null
    const float* addend;        // [num_rows, the weight's rows], or null
    const float* x_scales;      // of each row, for 8-bit weights
    const float* weight_scales; // of each of the weight's rows, for 8-bit weights
    int num_rows, out_features;
    int row_bytes;              // of x and of the weight, a multiple of 16
    Epilogue epilogue;
    bool is_bf16;               // bias, and out if not is_wide; else float16
    bool is_wide;               // out is float32
    int64_t x_stride, weight_stride, out_stride, addend_stride;
};

}  // namespace minivllm::cuda
