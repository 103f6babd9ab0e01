// Int8 products of rows that are made int8 as they come, shared by linear layers with weights of int8 and of fewer bits.
// On AMX tiles where there are, else by products of 16-bit pairs. Sums are exact integers, so every instruction set
// gives the same bits. Included by linear*.cpp only.
#pragma once

#include "integers.h"
#include "linear_tile.h"
#if defined(__AMX_INT8__)
#include "linear_amx.h"
#endif

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr int kVectors = 2;
constexpr float kLeastAmax = 1e-30f;  // a row of less counts as zero: the reciprocal of its scale could overflow

// [K/64][vectors of features][16 quads of k][kLanes][4].
struct Int8Layout {
    static constexpr int64_t kPanel = kVectors * kLanes, kStep = 64;
    static MINIVLLM_INLINE int64_t offset(int64_t column, int64_t k) {
        return k / 64 * 64 * kPanel + column / kLanes * 64 * kLanes + k % 64 / 4 * 4 * kLanes + column % kLanes * 4 +
               k % 4;
    }
};

// ---- from float to int8 ----

// x = scale × q, q in ±most. A row with a NaN or an infinity has a NaN for its scale: so will all its outputs.
struct RowScale {
    float scale, reciprocal;
};

// The largest magnitude of n numbers; not finite if one of them is not.
template <class X>
float largest_of(const X* x, int64_t n) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<X, bf16>) return largest_magnitude(x, n);
#endif
    Vec amax = zero();
    uint32_t finite = (1u << kLanes) - 1;
    auto take = [&](Vec v) {
        const Vec size = max(v, zero() - v);
        finite &= less_mask(size, set1(__builtin_inff()));
        amax = max(size, amax);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) take(load(x + i));
    if (i < n) take(load_partial(x + i, int(n - i)));
    return finite == (1u << kLanes) - 1 ? reduce_max(amax) : __builtin_inff();
}

template <class X>
RowScale scale_of(const X* x, int64_t n, float most = 127.0f) {
    const float largest = largest_of(x, n);
    if (!(largest < __builtin_inff())) return {__builtin_nanf(""), 0.0f};
    if (largest < kLeastAmax) return {0.0f, 0.0f};
    return {largest / most, most / largest};
}

// n numbers to q, and zeros up to `padded`, a multiple of 16. T: int8_t, int16_t or float.
template <class T, class X>
void quantise(T* to, const X* x, int64_t n, int64_t padded, float reciprocal) {
    const Vec factor = set1(reciprocal);
    const bool is_zero = reciprocal == 0.0f;  // and 0 × infinity is no number
    int64_t i = 0;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, int8_t> && std::is_same_v<X, bf16>)
        for (; !is_zero && i + 64 <= n; i += 64) store_64_products(to + i, x + i, factor);
#endif
    for (; i < padded; i += kLanes) {
        const int64_t left = n - i;
        const Vec v = is_zero || left <= 0 ? zero() : left >= kLanes ? load(x + i) : load_partial(x + i, int(left));
        store_integers(to + i, v * factor);
    }
}

// ---- scales of features, a float32 for each place of one, at the beginning of a packed weight ----

inline int64_t scales_bytes(const Features& features) {
    return round_up(features.num_panels<Int8Layout>() * Int8Layout::kPanel * int64_t(sizeof(float)), 64);
}

inline const float* scales_of_panel(const LinearCall& call, int64_t panel) {
    return static_cast<const float*>(call.packed) + panel * Int8Layout::kPanel;
}

// ---- multiplying ----

// int32 sums of some rows and one panel, as the floats they stand for.
struct Int8Sums {
    const int32_t* data;
    int64_t row_stride, vector_stride;
    const float* row_scales;
    const float* feature_scales;  // of the panel

    MINIVLLM_INLINE Vec at(int64_t r, int64_t v) const {
        const Vec scale = set1(row_scales[r]) * load(feature_scales + v * kLanes);
        return load_integers(data + r * row_stride + v * vector_stride) * scale;
    }
};

template <class A>
struct ScaledBlock : Block<A> {
    const float* scales;  // of the rows
};

// Rows of x as integers, row r's K in pieces of `width` at place(r, k); their scales behind them in the same scratch.
template <class A, class Place>
const float* quantise_rows(A* to, float* scales, const LinearCall& call, int64_t first, int64_t num_rows,
                           int64_t width, const Place& place) {
    const int64_t padded = round_up(call.k, Int8Layout::kStep);
    with_dtype(call.dtype, [&](auto tag) {
        using X = typename decltype(tag)::type;
        parallel_for(num_rows, 1 + 16384 / padded, [&](int64_t begin, int64_t end) {
            const InputRows<X> rows(call);
            for (int64_t r = begin; r < end; ++r) {
                const X* x = rows.row(first + r);
                const RowScale scale = scale_of(x, call.k);
                scales[r] = scale.scale;
                for (int64_t i = 0; i < padded; i += width)
                    quantise(to + place(r, i), x + i, call.k - i < width ? call.k - i : width, width, scale.reciprocal);
            }
        });
    });
    return scales;
}

#if defined(__AMX_INT8__)

// Rows as tiles, [rows/32][K/64][2 row groups][16][64].
struct Int8Rows {
    using A = int8_t;
    using Layout = Int8Layout;
    static constexpr int64_t kRows = kGroupRows;

    static ScaledBlock<int8_t> prepare(const LinearCall& call, int64_t first, int64_t num_rows) {
        const int64_t k = round_up(call.k, 64), tiles_bytes = round_up(num_rows, kRows) * k;
        int8_t* tiles = static_cast<int8_t*>(thread_scratch(0, size_t(tiles_bytes) + size_t(num_rows) * sizeof(float)));
        float* scales = reinterpret_cast<float*>(tiles + tiles_bytes);
        quantise_rows(tiles, scales, call, first, num_rows, 64,
                      [k](int64_t r, int64_t i) { return r / kRows * kRows * k + i * kRows + r % kRows * 64; });
        return {{tiles, num_rows, kRows * k, k}, scales};
    }
};

#else

// x as int16; for a quad of k, the weight's four bytes of kLanes features become two vectors of 16-bit pairs.
struct Int8Rows {
    using A = int16_t;
    using Layout = Int8Layout;
    static constexpr int64_t kRows = 4;

    static ScaledBlock<int16_t> prepare(const LinearCall& call, int64_t first, int64_t num_rows) {
        const int64_t k = round_up(call.k, 64);
        int16_t* rows = static_cast<int16_t*>(
            thread_scratch(0, size_t(num_rows) * (size_t(k) * sizeof(int16_t) + sizeof(float))));
        float* scales = reinterpret_cast<float*>(rows + num_rows * k);
        quantise_rows(rows, scales, call, first, num_rows, k, [k](int64_t r, int64_t) { return r * k; });
        return {{rows, num_rows, k, k}, scales};
    }

    // The rows from `row` on, at most kRows of them, times a panel of int8: sums[r][feature].
    static void multiply(int32_t* sums, const Block<int16_t>& block, int64_t row, int64_t rows, const int8_t* panel) {
        static constexpr decltype(&tile<1>) kTiles[] = {&tile<1>, &tile<2>, &tile<3>, &tile<4>};
        kTiles[rows - 1](sums, block.rows + row * block.stride, block.stride, panel, block.k);
    }

private:
    template <int R>
    static void tile(int32_t* sums, const int16_t* x, int64_t stride, const int8_t* panel, int64_t k) {
        PairSums acc[R][kVectors];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kVectors; ++v) acc[r][v] = no_pairs();
        for (int64_t i = 0; i < k; i += 4)
            for (int v = 0; v < kVectors; ++v) {
                const Quads w = widen_quads(panel + Layout::offset(v * kLanes, i));
                for (int r = 0; r < R; ++r) add_pairs(acc[r][v], w, x + r * stride + i);
            }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kVectors; ++v) fold_pairs(sums + r * Layout::kPanel + v * kLanes, acc[r][v]);
    }
};

#endif

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
