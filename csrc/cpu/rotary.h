#pragma once

#include <cstdint>

#include "dispatch.h"
#include "types.h"

namespace minivllm {

// x[token][head][dim], dim contiguous; strides in elements.
struct Heads {
    void* x;
    int64_t num_heads, token_stride, head_stride;
    const void* norm_weight;  // [head_dim], by which each head is normed before it is turned; or null
};

// Throws where a position is no row of the table of so many: it would be read from other memory.
void check_positions(const int64_t* positions, int64_t num_tokens, int64_t max_position);

struct RotaryKernels {
    // In place over q and k. cos_sin: [*, rot_dim] float32, cosines then sines; positions must be rows of it.
    void (*run)(DType dtype, Heads q, Heads k, int64_t head_dim, float eps, const int64_t* positions,
                int64_t num_tokens, const float* cos_sin, int64_t rot_dim);
};
MINIVLLM_KERNELS(RotaryKernels, rotary_kernels)

}  // namespace minivllm
