// Int8 products of rows that are made int8 as they come, shared by linear layers with weights of int8 and of fewer bits.
// On AMX tiles where there are, else by products of quads where there are those (AVX512_VNNI's vpdpbusd), else of 16-bit
// pairs. Sums are exact integers, so every instruction set gives the same bits. Included by linear*.cpp only.
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

#elif defined(__AVX512VNNI__)

// x as bytes with 128 added, as a product of quads takes one factor without a sign: what 128 times a feature's weights
// come to is subtracted from its sums. All of it modulo 2^32, so that only the result has to fit.
struct Int8Rows {
    using A = uint8_t;
    using Layout = Int8Layout;
    static constexpr int64_t kRows = 12;  // × kVectors accumulators, operands and a broadcast fit 32 registers

    static ScaledBlock<uint8_t> prepare(const LinearCall& call, int64_t first, int64_t num_rows) {
        const int64_t k = round_up(call.k, 64);
        uint8_t* rows = static_cast<uint8_t*>(thread_scratch(0, size_t(num_rows) * (size_t(k) + sizeof(float))));
        float* scales = reinterpret_cast<float*>(rows + num_rows * k);
        quantise_rows(reinterpret_cast<int8_t*>(rows), scales, call, first, num_rows, k,
                      [k](int64_t r, int64_t) { return r * k; });
        for (int64_t i = 0; i < num_rows * k; i += 64) {
            const __m512i q = _mm512_loadu_si512(rows + i);
            _mm512_storeu_si512(rows + i, _mm512_xor_si512(q, _mm512_set1_epi8(char(0x80))));
        }
        return {{rows, num_rows, k, k}, scales};
    }

    // A block times a panel of int8. finish(sums, row, rows): of some rows, [rows][feature].
    template <class Finish>
    static void multiply(const Block<uint8_t>& block, const int8_t* panel, const Finish& finish) {
        const int64_t chunk = block.num_rows <= kRows ? block.k : kChunk;
        int32_t* sums = static_cast<int32_t*>(
            thread_scratch(4, size_t((block.num_rows + 1) * Layout::kPanel) * sizeof(int32_t)));
        int32_t* excess = sums + block.num_rows * Layout::kPanel;
        for (int64_t first = 0; first < block.k; first += chunk) {
            const int64_t end = block.k - first < chunk ? block.k : first + chunk;
            for (int64_t row = 0; row < block.num_rows; row += kRows) {
                const int64_t rows = block.num_rows - row < kRows ? block.num_rows - row : kRows;
                const Tile tile{sums + row * Layout::kPanel, excess, block.rows + row * block.stride, block.stride,
                                panel, first, end, end == block.k};
                if (row == 0) add<true>(tile, rows);
                else add<false>(tile, rows);
                if (tile.is_last) finish(tile.sums, row, rows);
            }
        }
    }

private:
    static constexpr int64_t kChunk = 768;        // of K at a time: 24 KiB of a panel stay in L1
    static constexpr int64_t kAheadBytes = 4096;  // how far ahead the weight is fetched

    struct Tile {
        int32_t* sums;    // [rows][feature]
        int32_t* excess;  // [feature]: what 128 times the weights come to
        const uint8_t* x;
        int64_t stride;
        const int8_t* panel;
        int64_t first, end;  // of K
        bool is_last;        // of the chunks: the excess is taken off
    };

    template <bool kIsFirst>
    static void add(const Tile& tile, int64_t rows) {
        static constexpr decltype(&add_rows<1, kIsFirst>) kTiles[] = {
            &add_rows<1, kIsFirst>, &add_rows<2, kIsFirst>, &add_rows<3, kIsFirst>,  &add_rows<4, kIsFirst>,
            &add_rows<5, kIsFirst>, &add_rows<6, kIsFirst>, &add_rows<7, kIsFirst>,  &add_rows<8, kIsFirst>,
            &add_rows<9, kIsFirst>, &add_rows<10, kIsFirst>, &add_rows<11, kIsFirst>, &add_rows<12, kIsFirst>};
        kTiles[rows - 1](tile);
    }

    // R rows. kIsFirst: of the rows that pass here, these are the first, which fetch the weight and find the excess.
    template <int R, bool kIsFirst>
    static void add_rows(const Tile& tile) {
        __m512i acc[R][kVectors], excess[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            const bool is_zero = tile.first == 0;
            for (int r = 0; r < R; ++r) acc[r][v] = sums_at(tile.sums + r * Layout::kPanel + v * kLanes, is_zero);
            excess[v] = sums_at(tile.excess + v * kLanes, kIsFirst && is_zero);
        }
        const __m512i offset = _mm512_set1_epi8(char(0x80));
        for (int64_t i = tile.first; i < tile.end; i += 4) {
            __m512i w[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                const int8_t* from = tile.panel + Layout::offset(v * kLanes, i);
                w[v] = _mm512_loadu_si512(from);
                if constexpr (kIsFirst) {
                    _mm_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes, _MM_HINT_T0);
                    excess[v] = _mm512_dpbusd_epi32(excess[v], offset, w[v]);
                }
            }
            for (int r = 0; r < R; ++r) {
                int32_t quad;
                std::memcpy(&quad, tile.x + r * tile.stride + i, 4);
                const __m512i value = _mm512_set1_epi32(quad);
                for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], value, w[v]);
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            if (kIsFirst) _mm512_storeu_si512(tile.excess + v * kLanes, excess[v]);
            const __m512i less = tile.is_last ? excess[v] : _mm512_setzero_si512();
            for (int r = 0; r < R; ++r)
                _mm512_storeu_si512(tile.sums + r * Layout::kPanel + v * kLanes, _mm512_sub_epi32(acc[r][v], less));
        }
    }

    static MINIVLLM_INLINE __m512i sums_at(const int32_t* sums, bool is_zero) {
        return is_zero ? _mm512_setzero_si512() : _mm512_loadu_si512(sums);
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

    // A block times a panel of int8. finish(sums, row, rows): of some rows, [rows][feature].
    template <class Finish>
    static void multiply(const Block<int16_t>& block, const int8_t* panel, const Finish& finish) {
        static constexpr decltype(&tile<1>) kTiles[] = {&tile<1>, &tile<2>, &tile<3>, &tile<4>};
        alignas(64) int32_t sums[kRows * Layout::kPanel];
        for (int64_t row = 0; row < block.num_rows; row += kRows) {
            const int64_t rows = block.num_rows - row < kRows ? block.num_rows - row : kRows;
            kTiles[rows - 1](sums, block.rows + row * block.stride, block.stride, panel, block.k);
            finish(sums, row, rows);
        }
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
