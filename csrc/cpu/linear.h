#pragma once

#include <cstdint>

#include "dispatch.h"
#include "kv_write.h"
#include "types.h"

namespace minivllm {

// What becomes of the float32 sums of a linear layer. Values are rounded to the output's type where the separate
// operations would round them, so that fused and separate give the same bits.
enum class Epilogue : int {
    store = 0,         // out = sum
    add_residual = 1,  // out += sum
    silu_mul = 2,      // out = silu(gate) * up, of a weight whose first n/2 rows are the gate's, packed interleaved
    lead = 3,          // out, a `Leader` a row, = whichever leads: it or one of the row's sums, which are not kept
    heads = 4,         // what `HeadsEnd` says, head by head, while they are in the cache
};

// The largest of a row's outputs so far, and the lowest place that has it; infinite if one is that, or is no number.
struct alignas(8) Leader {
    float value;
    int32_t index;
};

struct LinearCall;

// A table of its own: products have instruction sets that rotation and cache write, whose bits these are, do not have.
struct HeadsKernels {
    // Rows [first_row, first_row + num_rows) of `num_columns` outputs from number `column` on, whole heads, to where they
    // belong. They lie in `rows`, `stride` elements apart, and may be changed there.
    void (*finish)(const LinearCall& call, void* rows, int64_t stride, int64_t column, int64_t num_columns,
                   int64_t first_row, int64_t num_rows);
};
MINIVLLM_KERNELS(HeadsKernels, heads_kernels)

// Of a projection whose outputs are heads of queries, of keys and of values, in this order: queries and keys are normed
// and turned as in rotary.h, queries go to the output, keys and values to the cache or to `kept`.
struct HeadsEnd {
    int64_t num_q_heads;
    const void *q_norm, *k_norm;  // [head_dim], or null
    float eps;
    const int64_t* positions;
    const float* cos_sin;  // [*, rot_dim]
    int64_t rot_dim;
    KvWrite write;  // of m tokens; its k and v are not looked at
    const HeadsKernels* kernels;
    void* kept = nullptr;  // [m, 2 × KV heads, head_dim], where keys and values go instead of the cache; or null
};

// RMSNorm of the rows of x before they are multiplied, with the bits of rms_norm.h.
struct RowNorm {
    const void* weight;  // [k], or null: no norm
    DType weight_dtype;  // x's, or float32
    float eps;
};

// y[m][n] = Σ_k x[m][k]·w[n][k] + addend[m][n] + bias[n], then the epilogue. Rows contiguous; strides in elements.
struct LinearCall {
    DType dtype;  // of x and of the packed weight
    int64_t m, n, k;
    const void* x;
    int64_t x_stride;
    const void* packed;
    const void* bias;  // [n], or null
    DType bias_dtype;
    const float* addend;  // [m, n], or null
    int64_t addend_stride;
    Epilogue epilogue;
    void* out;  // [m, n]; with silu_mul [m, n / 2]; with lead [m] of Leader; with heads [m, q heads × head_dim]
    DType out_dtype;
    int64_t out_stride;
    RowNorm norm = {nullptr, DType::f32, 0.0f};
    const HeadsEnd* heads = nullptr;  // of Epilogue::heads
};

// Rows [start, start + rows) of a weight, to be packed.
struct WeightRows {
    DType dtype;  // of the packed weight
    int64_t n, k, start, rows;
    const void* source;
    DType source_dtype;
    int64_t source_stride;
    bool interleaved;  // for silu_mul
};

// A kind of linear layer: how a weight is packed, read back and multiplied by. A dtype is that of x.
struct LinearKernels {
    int64_t (*packed_bytes)(DType dtype, int64_t n, int64_t k, bool interleaved);
    void (*load_rows)(void* packed, const WeightRows& rows);
    // out: [num_ids, k] of `dtype`: the rows of a weight that is not interleaved.
    void (*gather_rows)(DType dtype, void* out, const void* packed, int64_t n, int64_t k, const int64_t* ids,
                        int64_t num_ids);
    void (*multiply)(const LinearCall& call);
};
MINIVLLM_PAIR_KERNELS(LinearKernels, linear_kernels)  // weights of x's dtype

// Weights of int8 (one scale an output feature, whole rows of K loaded at a time), and x made int8 row by row. The sums
// are int32 and exact; float(sum) × (row's scale × feature's scale) is what `LinearCall` calls the sum.
MINIVLLM_BYTE_KERNELS(LinearKernels, int8_linear_kernels)

// The same, but that a weight is a code of 4 bits times a whole multiplier, one for each 128 of a feature's K.
MINIVLLM_BYTE_KERNELS(LinearKernels, int4_linear_kernels)

}  // namespace minivllm
