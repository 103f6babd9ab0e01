// x · weightᵀ for 1 to 16 rows of x, with its epilogue: what it takes is the time to read the weight once.
//
// A thread block makes 8 * kTiles features of all rows (for a gated weight as many of gate and of up). Its warps share
// K: warp w takes every kWarps-th step of 128 bytes of a row, ascending, and keeps kDepth of its steps under way in
// registers. The warps' sums are added up in their order. So a row's bits depend on no other row, nor on how many there
// are up to 16; they do depend on kWarps.
//
// x is the first factor of a tensor core's product (most of whose 16 rows may be empty: reading is the limit), eight
// rows of the weight the second. The order of k in a product is that in which a thread finds 16 bytes side by side: with
// g = lane / 4 and t = lane % 4 it holds those at 64 j + 16 t of row g, which are the words of two products. They come
// from memory to the registers that multiply them, through no shared memory.
//
// The weight's first steps are asked for before the kernels launched before are done (programmatic dependent launch).
#pragma once

#include <cstdint>
#include <type_traits>

#include "device.h"
#include "few_rows_sizes.h"
#include "fp8.h"

namespace minivllm::cuda {

template <WeightType kType>
using SumOf = std::conditional_t<kType == WeightType::int8, int32_t, float>;

// c += a · b of 16 bytes of each row: `top` of row g of x, `bottom` of row g + 8, `its` of row g of the weight. 8-bit
// floats are multiplied as float16, which holds each of them: Hopper's own products of them keep 14 bits of a sum.
template <WeightType kType>
MINIVLLM_DEVICE void multiply_chunks(SumOf<kType> (&c)[4], uint4 top, uint4 bottom, uint4 its) {
    if constexpr (kType == WeightType::int8) {
        multiply_add_int8(c, {top.x, bottom.x, top.y, bottom.y}, {its.x, its.y});
        multiply_add_int8(c, {top.z, bottom.z, top.w, bottom.w}, {its.z, its.w});
    } else if constexpr (kType == WeightType::fp8) {
        const auto add = [&](uint32_t a, uint32_t b, uint32_t w) {
            multiply_add<false>(c, {halves_of_fp8(a), halves_of_fp8(b), halves_of_fp8(a >> 16), halves_of_fp8(b >> 16)},
                                {halves_of_fp8(w), halves_of_fp8(w >> 16)});
        };
        add(top.x, bottom.x, its.x), add(top.y, bottom.y, its.y), add(top.z, bottom.z, its.z), add(top.w, bottom.w, its.w);
    } else {
        multiply_add<kType == WeightType::bf16>(c, {top.x, bottom.x, top.y, bottom.y}, {its.x, its.y});
        multiply_add<kType == WeightType::bf16>(c, {top.z, bottom.z, top.w, bottom.w}, {its.z, its.w});
    }
}

MINIVLLM_DEVICE float number_of(uint16_t bits, bool is_bf16) { return is_bf16 ? unpack<true>(bits) : unpack<false>(bits); }

MINIVLLM_DEVICE uint16_t bits_of(float x, bool is_bf16) {
    return uint16_t(is_bf16 ? pack<true>(x, 0.0f) : pack<false>(x, 0.0f));
}

MINIVLLM_DEVICE float rounded(float x, bool is_bf16) { return number_of(bits_of(x, is_bf16), is_bf16); }

// A sum, scaled, with addend and bias. feature: a row of the weight.
template <WeightType kType>
MINIVLLM_DEVICE float dressed(const FewRows& p, SumOf<kType> sum, int row, int feature) {
    float y = float(sum);
    if constexpr (kType == WeightType::int8 || kType == WeightType::fp8)
        y *= p.x_scales[row] * p.weight_scales[feature];
    if (p.addend != nullptr) y += p.addend[row * p.addend_stride + feature];
    if (p.bias != nullptr) y += number_of(static_cast<const uint16_t*>(p.bias)[feature], p.is_bf16);
    return y;
}

MINIVLLM_DEVICE void finish(const FewRows& p, float y, int row, int feature) {
    const int64_t place = row * p.out_stride + feature;
    if (p.is_wide) {
        static_cast<float*>(p.out)[place] = y;
        return;
    }
    uint16_t* const out = static_cast<uint16_t*>(p.out) + place;
    if (p.epilogue == Epilogue::add_residual) y += number_of(load_shared_line(out), p.is_bf16);
    *out = bits_of(y, p.is_bf16);
}

template <int kTiles, bool kIsGated, int kRows, int kWarps>
constexpr int few_rows_shared_bytes() {
    return kWarps * (kIsGated ? 2 : 1) * 8 * kTiles * kRows * 4;
}

// Grid: out_features / (8 * kTiles), rounded up, of 32 * kWarps. kRows: 8 or 16, no fewer than num_rows.
template <WeightType kType, int kTiles, bool kIsGated, int kRows, int kWarps, int kDepth, int kBlocks>
MINIVLLM_KERNEL(32 * kWarps, kBlocks) few_rows_product(const FewRows p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return;  // not launched there, see ops/cuda.py
#else
    constexpr int kMatrices = kIsGated ? 2 : 1, kAll = kMatrices * kTiles, kHalves = kRows / 8;
    using Sum = SumOf<kType>;
    MINIVLLM_SHARED(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_feature = blockIdx.x * 8 * kTiles;
    let_next_kernel_begin();

    const char* from[kAll];  // features that are not there read the last one's row, and are not stored
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
        const int feature = first_feature + 8 * (i % kTiles) + g;
        const int there = feature < p.out_features ? feature : p.out_features - 1;
        from[i] = p.weight + (int64_t(i / kTiles) * p.out_features + there) * p.weight_stride;
    }
    const char* const x_rows = p.x + g * p.x_stride;

    uint4 weights[kDepth][kAll][2], rows[kDepth][kHalves][2];
    const uint4 zeros = {0, 0, 0, 0};
    const auto fetch_weights = [&](int slot, int step) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int at = 128 * step + 64 * j + 16 * t;
#pragma unroll
            for (int i = 0; i < kAll; ++i) {
                weights[slot][i][j] = zeros;
                if (at < p.row_bytes) weights[slot][i][j] = load_streamed(from[i] + at);
            }
        }
    };
    const auto fetch_rows = [&](int slot, int step) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int at = 128 * step + 64 * j + 16 * t;
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                rows[slot][half][j] = zeros;
                if (at < p.row_bytes && g + 8 * half < p.num_rows)
                    rows[slot][half][j] = *reinterpret_cast<const uint4*>(x_rows + 8 * half * p.x_stride + at);
            }
        }
    };

    Sum sums[kAll][4];
#pragma unroll
    for (int i = 0; i < kAll; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
    const int num_steps = (p.row_bytes + 127) / 128;
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot) fetch_weights(slot, warp + slot * kWarps);
    wait_for_earlier_kernels();
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot) fetch_rows(slot, warp + slot * kWarps);
    for (int start = warp; start < num_steps; start += kDepth * kWarps) {
#pragma unroll
        for (int slot = 0; slot < kDepth; ++slot) {  // those beyond the end are zeros
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint4 top = rows[slot][0][j], bottom = kHalves == 2 ? rows[slot][kHalves - 1][j] : zeros;
#pragma unroll
                for (int i = 0; i < kAll; ++i) multiply_chunks<kType>(sums[i], top, bottom, weights[slot][i][j]);
            }
            fetch_weights(slot, start + (kDepth + slot) * kWarps);
            fetch_rows(slot, start + (kDepth + slot) * kWarps);
        }
    }

    Sum* const parts = reinterpret_cast<Sum*>(shared);  // [kWarps, kAll * 8 features, kRows]
#pragma unroll
    for (int i = 0; i < kAll; ++i)
#pragma unroll
        for (int c = 0; c < 2 * kHalves; ++c)
            parts[(warp * kAll * 8 + 8 * i + 2 * t + c % 2) * kRows + g + c / 2 * 8] = sums[i][c];
    barrier();
    for (int at = threadIdx.x; at < 8 * kTiles * p.num_rows; at += 32 * kWarps) {
        const int column = at % (8 * kTiles), row = at / (8 * kTiles), feature = first_feature + column;
        if (feature >= p.out_features) continue;
        Sum all[kMatrices];
#pragma unroll
        for (int matrix = 0; matrix < kMatrices; ++matrix) {
            const Sum* const part = parts + (matrix * kTiles * 8 + column) * kRows + row;
            all[matrix] = part[0];
#pragma unroll
            for (int w = 1; w < kWarps; ++w) all[matrix] += part[w * kAll * 8 * kRows];
        }
        float y = dressed<kType>(p, all[0], row, feature);
        if constexpr (kIsGated) {
            const float gate = rounded(y, p.is_bf16);
            const float active = rounded(gate / (1.0f + exp_2(-1.4426950408889634f * gate)), p.is_bf16);
            y = active * rounded(dressed<kType>(p, all[1], row, p.out_features + feature), p.is_bf16);
        }
        finish(p, y, row, feature);
    }
#endif
}

}  // namespace minivllm::cuda
