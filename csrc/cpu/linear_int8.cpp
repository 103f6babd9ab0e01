// Linear layers in int8: on AMX tiles where there are, else by products of 16-bit pairs. Sums are exact integers, so
// every instruction set gives the same bits.
//
// A packed weight: a float32 scale for each place of a feature, then the panels,
// [K/64][vectors of features][16 quads of k][kLanes][4].
#include "linear.h"

#include "integers.h"
#include "linear_tile.h"
#if defined(__AMX_INT8__)
#include "linear_amx.h"
#endif

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr int kVectors = 2;
constexpr float kLeastAmax = 1e-30f;  // a row of less counts as zero: the reciprocal of its scale could overflow

struct Int8Layout {
    static constexpr int64_t kPanel = kVectors * kLanes, kStep = 64;
    static MINIVLLM_INLINE int64_t offset(int64_t column, int64_t k) {
        return k / 64 * 64 * kPanel + column / kLanes * 64 * kLanes + k % 64 / 4 * 4 * kLanes + column % kLanes * 4 +
               k % 4;
    }
};

// ---- from float to int8 ----

// x = scale × q, q in [-127, 127]. A row with a NaN or an infinity has a NaN for its scale: so will all its outputs.
struct RowScale {
    float scale, reciprocal;
};

template <class X>
RowScale scale_of(const X* x, int64_t n) {
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
    if (finite != (1u << kLanes) - 1) return {__builtin_nanf(""), 0.0f};
    const float largest = reduce_max(amax);
    if (largest < kLeastAmax) return {0.0f, 0.0f};
    return {largest / 127.0f, 127.0f / largest};
}

// n numbers to q, and zeros up to `padded`, a multiple of 16. T: int8_t or int16_t.
template <class T, class X>
void quantise(T* to, const X* x, int64_t n, int64_t padded, float reciprocal) {
    const Vec factor = set1(reciprocal);
    const bool is_zero = reciprocal == 0.0f;  // and 0 × infinity is no number
    for (int64_t i = 0; i < padded; i += kLanes) {
        const int64_t left = n - i;
        const Vec v = is_zero || left <= 0 ? zero() : left >= kLanes ? load(x + i) : load_partial(x + i, int(left));
        store_integers(to + i, v * factor);
    }
}

// ---- packing ----

int64_t scales_bytes(const Features& features) {
    return round_up(features.num_panels<Int8Layout>() * Int8Layout::kPanel * int64_t(sizeof(float)), 64);
}

int64_t packed_bytes(DType, int64_t n, int64_t k, bool interleaved) {
    const Features features{n, interleaved};
    return scales_bytes(features) + features.num_panels<Int8Layout>() * panel_elements<Int8Layout>(k);
}

void load_weight(void* packed, const WeightRows& rows) {
    float* scales = static_cast<float*>(packed);
    int8_t* panels = static_cast<int8_t*>(packed) + scales_bytes({rows.n, rows.interleaved});
    const int64_t padded = round_up(rows.k, Int8Layout::kStep);
    with_dtype(rows.source_dtype, [&](auto tag) {
        using S = typename decltype(tag)::type;
        for_vectors_of_rows<Int8Layout>(rows, [&](int64_t panel, int64_t first, int64_t last, int64_t row) {
            int8_t* to = panels + panel * panel_elements<Int8Layout>(rows.k);
            int8_t* q = static_cast<int8_t*>(thread_scratch(1, size_t(padded)));
            for (int64_t column = first; column < last; ++column, ++row) {
                const S* source = static_cast<const S*>(rows.source) + row * rows.source_stride;
                const RowScale scale = scale_of(source, rows.k);
                quantise(q, source, rows.k, padded, scale.reciprocal);
                scales[panel * Int8Layout::kPanel + column] = scale.scale;
                for (int64_t i = 0; i < padded; i += 4) std::memcpy(to + Int8Layout::offset(column, i), q + i, 4);
            }
        });
    });
}

void gather(DType dtype, void* out, const void* packed, int64_t n, int64_t k, const int64_t* ids, int64_t num_ids) {
    const float* scales = static_cast<const float*>(packed);
    const int8_t* panels = static_cast<const int8_t*>(packed) + scales_bytes({n, false});
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(num_ids, 1 + 4096 / k, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t column = ids[i] % Int8Layout::kPanel;
                const int8_t* panel = panels + ids[i] / Int8Layout::kPanel * panel_elements<Int8Layout>(k);
                T* to = static_cast<T*>(out) + i * k;
                for (int64_t j = 0; j < k; ++j)
                    to[j] = from_float<T>(float(panel[Int8Layout::offset(column, j)]) * scales[ids[i]]);
            }
        });
    });
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
            for (int64_t r = begin; r < end; ++r) {
                const X* x = static_cast<const X*>(call.x) + (first + r) * call.x_stride;
                const RowScale scale = scale_of(x, call.k);
                scales[r] = scale.scale;
                for (int64_t i = 0; i < padded; i += width)
                    quantise(to + place(r, i), x + i, call.k - i < width ? call.k - i : width, width, scale.reciprocal);
            }
        });
    });
    return scales;
}

const int8_t* panels_of(const LinearCall& call) {
    return static_cast<const int8_t*>(call.packed) + scales_bytes({call.n, call.epilogue == Epilogue::silu_mul});
}
const float* scales_of_panel(const LinearCall& call, int64_t panel) {
    return static_cast<const float*>(call.packed) + panel * Int8Layout::kPanel;
}

#if defined(__AMX_INT8__)

struct Int8Kernel {
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

    static void run(const LinearCall& call, const ScaledBlock<int8_t>& block, int64_t first_row, const Panels& panels) {
        multiply_panels<Int8Product>(
            call, block, first_row, panels_of(call), panel_elements<Layout>(call.k), panels,
            [&](int64_t panel, int64_t row, const float* data) {
                return Int8Sums{reinterpret_cast<const int32_t*>(data), 16, kTileSums, block.scales + row,
                                scales_of_panel(call, panel)};
            });
    }
};

#else

// x as int16; for a quad of k, the weight's four bytes of kLanes features become two vectors of 16-bit pairs.
struct Int8Kernel {
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

    static void run(const LinearCall& call, const ScaledBlock<int16_t>& block, int64_t first_row,
                    const Panels& panels) {
        static constexpr decltype(&tile<1>) kTiles[] = {&tile<1>, &tile<2>, &tile<3>, &tile<4>};
        const int64_t size = panel_elements<Layout>(call.k);
        alignas(64) int32_t sums[kRows * Layout::kPanel];
        for (int64_t p = panels.first; p < panels.end; ++p) {
            const PanelEnd<kVectors> panel_end(call, p);
            const float* scales = scales_of_panel(call, p);
            for (int64_t row = 0; row < block.num_rows; row += kRows) {
                const int64_t rows = block.num_rows - row < kRows ? block.num_rows - row : kRows;
                kTiles[rows - 1](sums, block.rows + row * block.stride, block.stride, panels_of(call) + p * size,
                                 block.k);
                panel_end.finish(Int8Sums{sums, Layout::kPanel, kLanes, block.scales + row, scales}, first_row + row,
                                 rows);
            }
        }
    }

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

void multiply(const LinearCall& call) { multiply_blocks<Int8Kernel>(call); }

}  // namespace

const LinearKernels int8_linear_kernels = {&packed_bytes, &load_weight, &gather, &multiply};

}  // namespace minivllm::MINIVLLM_ISA
