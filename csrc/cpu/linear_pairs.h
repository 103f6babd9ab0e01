// Linear layers in bfloat16 by products of pairs (AVX512_BF16's vdpbf16ps). Included by linear.cpp only.
//
// The instruction adds two products to each float32 lane: the pair's second element's first, then the first one's, each
// product and sum rounded once (to nearest even, as an fma does). Subnormal inputs, sums and results count as zero. An
// output is one chain of them over ascending pairs of k, whatever the number of rows; an odd K ends with a zero.
//
// K is cut into chunks: as all rows pass a chunk of a panel, it stays in L1. Between chunks, sums wait in memory, exactly.
#pragma once

#include "linear_tile.h"
#include "vec_math.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// [pairs of k][64 columns][2].
struct PairLayout {
    static constexpr int64_t kPanel = 64, kStep = 2;
    static constexpr int64_t kPair = kPanel * 2;  // elements
    static constexpr bool kHasFastPack = true;
    static MINIVLLM_INLINE int64_t offset(int64_t column, int64_t k) { return k / 2 * kPair + column * 2 + k % 2; }

    // 16 whole columns from `first` on, 16 pairs of k at a time, transposed.
    template <class S>
    static void pack(bf16* panel, const S* source, int64_t stride, int64_t first, int64_t k) {
        const int64_t whole = std::is_same_v<S, bf16> ? k / 32 * 32 : 0;
        for (int64_t i = 0; i < whole; i += 32) {
            Vec pairs[16];
            for (int r = 0; r < 16; ++r) std::memcpy(&pairs[r], source + r * stride + i, 64);
            transpose(pairs);
            for (int p = 0; p < 16; ++p) std::memcpy(panel + offset(first, i + 2 * p), &pairs[p], 64);
        }
        if (whole < k)
            pack_columns<PairLayout>(panel + offset(0, whole), source + whole, stride, first, first + 16, k - whole);
    }
};

class PairKernel {
public:
    using A = bf16;
    using Layout = PairLayout;
    static constexpr int64_t kRows = 6;  // × kVectors accumulators, operands and a broadcast fit 32 registers

    // x as it is; or normed, and with a zero behind an odd K.
    static Block<bf16> prepare(const LinearCall& call, int64_t first, int64_t num_rows) {
        const int64_t k = round_up(call.k, 2);
        if (call.k == k && call.norm.weight == nullptr)
            return {static_cast<const bf16*>(call.x) + first * call.x_stride, num_rows, call.x_stride, k};
        bf16* even = static_cast<bf16*>(thread_scratch(0, size_t(num_rows * k) * sizeof(bf16)));
        parallel_for(num_rows, 1 + 32768 / k, [&](int64_t begin, int64_t end) {
            const InputRows<bf16> rows(call);
            for (int64_t row = begin; row < end; ++row) {
                even[row * k + k - 1] = bf16{0};
                std::memcpy(even + row * k, rows.row(first + row), size_t(call.k) * sizeof(bf16));
            }
        });
        return {even, num_rows, k, k};
    }

    static void run(const LinearCall& call, const Block<bf16>& block, int64_t first_row, const Panels& panels) {
        const int64_t size = panel_elements<Layout>(call.k);
        float* sums = static_cast<float*>(thread_scratch(1, size_t(block.num_rows * Layout::kPanel) * sizeof(float)));
        for (int64_t p = panels.first; p < panels.end; ++p)
            multiply_panel(PanelEnd<kVectors>(call, p), sums, block, first_row,
                           static_cast<const bf16*>(call.packed) + p * size);
    }

private:
    static constexpr int kVectors = 4;
    static constexpr int64_t kChunkPairs = 96;     // 24 KiB of a panel
    static constexpr int64_t kAheadBytes = 4096;   // how far ahead the weight is fetched

    static void multiply_panel(const PanelEnd<kVectors>& panel_end, float* sums, const Block<bf16>& block,
                               int64_t first_row, const bf16* panel) {
        const int64_t num_pairs = block.k / 2, chunk = block.num_rows <= kRows ? num_pairs : kChunkPairs;
        for (int64_t first = 0; first < num_pairs; first += chunk) {
            const int64_t pairs = num_pairs - first < chunk ? num_pairs - first : chunk;
            for (int64_t row = 0; row < block.num_rows; row += kRows) {
                const int64_t rows = block.num_rows - row < kRows ? block.num_rows - row : kRows;
                float* to = sums + row * Layout::kPanel;
                const Tile tile{to, block.rows + row * block.stride + first * 2, block.stride,
                                panel + first * Layout::kPair, pairs, first == 0};
                if (row == 0) add<true>(tile, rows);
                else add<false>(tile, rows);
                if (first + pairs == num_pairs)
                    panel_end.finish(FloatSums{to, Layout::kPanel, kLanes}, first_row + row, rows);
            }
        }
    }

    struct Tile {
        float* sums;  // [rows][kPanel]
        const bf16* x;
        int64_t stride;
        const bf16* panel;
        int64_t pairs;
        bool is_first;  // no sums yet
    };

    template <bool kFetches>
    static void add(const Tile& tile, int64_t rows) {
        static constexpr decltype(&add_rows<1, kFetches>) kTiles[] = {
            &add_rows<1, kFetches>, &add_rows<2, kFetches>, &add_rows<3, kFetches>,
            &add_rows<4, kFetches>, &add_rows<5, kFetches>, &add_rows<6, kFetches>};
        kTiles[rows - 1](tile);
    }

    // sums[r][c] += Σ x[r][k]·panel[k][c] for R rows. kFetches: of the rows that pass here, these are the first.
    template <int R, bool kFetches>
    static void add_rows(const Tile& tile) {
        __m512 acc[R][kVectors];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kVectors; ++v)
                acc[r][v] = tile.is_first ? _mm512_setzero_ps()
                                          : _mm512_loadu_ps(tile.sums + r * Layout::kPanel + v * kLanes);
        const bf16 *w = tile.panel, *x = tile.x;
        for (int64_t i = 0; i < tile.pairs; ++i, w += Layout::kPair, x += 2) {
            __m512bh pairs[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                if (kFetches) _mm_prefetch(reinterpret_cast<const char*>(w + v * 32) + kAheadBytes, _MM_HINT_T0);
                pairs[v] = (__m512bh)_mm512_loadu_si512(w + v * 32);
            }
            for (int r = 0; r < R; ++r) {
                int32_t pair;
                std::memcpy(&pair, x + r * tile.stride, 4);
                const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
                for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], value, pairs[v]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(tile.sums + r * Layout::kPanel + v * kLanes, acc[r][v]);
    }
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
