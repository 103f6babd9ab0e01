// Linear layers over packed weights. bfloat16 goes to AMX where there is AMX, else to products of pairs where there are
// those; all else is fused multiply-adds in float32: each output is one chain over ascending k, whatever the number of
// rows.
#include "linear.h"

#include "isa.h"
#include "linear_tile.h"
#if defined(__AMX_BF16__)
#include "linear_amx.h"
#elif defined(__AVX512BF16__)
#include "linear_pairs.h"
#endif

namespace minivllm::MINIVLLM_ISA {
namespace {

// Rows and vectors of columns summed at a time: as many as the register file holds.
constexpr int kTileRows = 6;
constexpr int kVectors = kLanes == 16 ? 4 : 2;

struct FmaLayout {
    static constexpr int64_t kPanel = kVectors * kLanes, kStep = 1;
    static constexpr bool kHasFastPack = false;
    static MINIVLLM_INLINE int64_t offset(int64_t column, int64_t k) { return k * kPanel + column; }
};

// sums[r][c] = Σ_k x[r][k]·panel[k][c] for R rows.
template <class W, int R>
void fma_tile(float* sums, const float* x, int64_t stride, const W* panel, int64_t k) {
    Vec acc[R][kVectors];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
    for (int64_t i = 0; i < k; ++i, panel += FmaLayout::kPanel) {
        Vec w[kVectors];
        for (int v = 0; v < kVectors; ++v) w[v] = load(panel + v * kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec value = set1(x[r * stride + i]);
            for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(value, w[v], acc[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) store(sums + r * FmaLayout::kPanel + v * kLanes, acc[r][v]);
}

// A block's rows times one panel, a tile at a time and on to the output.
template <class W>
void multiply_panel(const PanelEnd<kVectors>& panel_end, const Block<float>& block, int64_t first_row,
                    const W* panel) {
    constexpr int64_t kPanel = FmaLayout::kPanel;
    static constexpr decltype(&fma_tile<W, 1>) kTiles[] = {&fma_tile<W, 1>, &fma_tile<W, 2>, &fma_tile<W, 3>,
                                                           &fma_tile<W, 4>, &fma_tile<W, 5>, &fma_tile<W, 6>};
    alignas(64) float sums[kTileRows * kPanel];
    for (int64_t row = 0; row < block.num_rows; row += kTileRows) {
        const int64_t rows = block.num_rows - row < kTileRows ? block.num_rows - row : kTileRows;
        kTiles[rows - 1](sums, block.rows + row * block.stride, block.stride, panel, block.k);
        panel_end.finish(FloatSums{sums, kPanel, kLanes}, first_row + row, rows);
    }
}

template <class T>  // of x and of the weight
struct FmaKernel {
    using A = float;
    using Layout = FmaLayout;
    static constexpr int64_t kRows = kTileRows;

    static Block<float> prepare(const LinearCall& call, int64_t first, int64_t num_rows) {
        if constexpr (std::is_same_v<T, float>)
            if (call.norm.weight == nullptr)
                return {static_cast<const T*>(call.x) + first * call.x_stride, num_rows, call.x_stride, call.k};
        float* wide = static_cast<float*>(thread_scratch(0, num_rows * call.k * sizeof(float)));
        parallel_for(num_rows, 1 + 16384 / call.k, [&](int64_t begin, int64_t end) {
            const InputRows<T> rows(call);
            for (int64_t row = begin; row < end; ++row)
                convert_row(wide + row * call.k, rows.row(first + row), call.k, call.k);
        });
        return {wide, num_rows, call.k, call.k};
    }

    static void run(const LinearCall& call, const Block<float>& block, int64_t first_row, const Panels& panels) {
        const int64_t size = panel_elements<Layout>(call.k);
        for (int64_t p = panels.first; p < panels.end; ++p) {
            const T* panel = static_cast<const T*>(call.packed) + p * size;
            const PanelEnd<kVectors> panel_end(call, p);
            if (std::is_same_v<T, float> || block.num_rows <= 2 * kRows) {
                multiply_panel(panel_end, block, first_row, panel);
            } else {  // widened once, not once for every tile; exact, so the bits are the same
                float* wide = static_cast<float*>(thread_scratch(1, size * sizeof(float)));
                convert_row(wide, panel, size, size);
                multiply_panel(panel_end, block, first_row, wide);
            }
        }
    }
};

// Of x and the weight in type T.
template <class T>
struct KernelOf { using type = FmaKernel<T>; };
#if defined(__AMX_BF16__)
template <>
struct KernelOf<bf16> { using type = AmxKernel; };
#elif defined(__AVX512BF16__)
template <>
struct KernelOf<bf16> { using type = PairKernel; };
#endif

// Calls fn(Layout{}, Type<W>{}): the layout and element type a weight of this dtype is packed in.
template <class F>
MINIVLLM_INLINE void with_layout(DType dtype, const F& fn) {
    with_dtype(dtype, [&](auto tag) {
        return fn(typename KernelOf<typename decltype(tag)::type>::type::Layout{}, tag);
    });
}

int64_t packed_bytes(DType dtype, int64_t n, int64_t k, bool interleaved) {
    int64_t bytes = 0;
    with_layout(dtype, [&](auto layout, auto tag) {
        using Layout = decltype(layout);
        const int64_t num_panels = Features{n, interleaved}.template num_panels<Layout>();
        bytes = num_panels * panel_elements<Layout>(k) * int64_t(sizeof(typename decltype(tag)::type));
    });
    return bytes;
}

void load(void* packed, const WeightRows& rows) {
    with_layout(rows.dtype, [&](auto layout, auto tag) {
        load_rows<decltype(layout), typename decltype(tag)::type>(packed, rows);
    });
}

void gather(DType dtype, void* out, const void* packed, int64_t, int64_t k, const int64_t* ids, int64_t num_ids) {
    with_layout(dtype, [&](auto layout, auto tag) {
        gather_rows<decltype(layout), typename decltype(tag)::type>(out, packed, k, ids, num_ids);
    });
}

void multiply(const LinearCall& call) {
    with_dtype(call.dtype, [&](auto tag) {
        multiply_blocks<typename KernelOf<typename decltype(tag)::type>::type>(call);
    });
}

}  // namespace

const LinearKernels linear_kernels = {&packed_bytes, &load, &gather, &multiply};

}  // namespace minivllm::MINIVLLM_ISA
