// Linear layers in bfloat16 on AMX tiles. Included by linear.cpp only.
//
// A tile product adds, for each of 16 rows and 16 columns, 16 pairs of products to a float32 sum, in an order
// that is the processor's and the same for every row, however many rows the tile has. K goes up in steps of 32.
// Subnormal inputs and results count as zero, as always with AMX.
//
// Two row tiles by two column tiles of sums use four loads for four products: the loads must come from L1 for the
// products to be the limit. So K is cut into chunks whose part of a panel stays in L1 while all rows pass; rows are
// loaded with the streaming hint, which leaves it there; between chunks, sums wait in memory, exactly.
#pragma once

#include "linear_tile.h"
#include "vec_math.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr int64_t kTile = 512;        // bfloat16 in a tile: 1 KiB
constexpr int64_t kTileSums = 256;    // float32 in a tile
constexpr int64_t kChunkSteps = 16;   // of K: 32 KiB of a panel
constexpr int64_t kAheadBytes = 8192;  // how far ahead of a thin product the weight is fetched

// [K/32][2 column groups][16 pairs of k][16 columns][2]: each [16][16][2] is one tile, 1 KiB.
struct AmxLayout {
    static constexpr int64_t kPanel = 32, kStep = 32;
    static constexpr bool kHasFastPack = true;
    static MINIVLLM_INLINE int64_t offset(int64_t column, int64_t k) {
        return k / 32 * 1024 + column / 16 * 512 + k % 32 / 2 * 32 + column % 16 * 2 + k % 2;
    }

    // 16 whole columns from `first` on: a tile is 16 rows of 16 pairs, transposed.
    template <class S>
    static void pack(bf16* panel, const S* source, int64_t stride, int64_t first, int64_t k) {
        alignas(64) bf16 rows[16][32];
        for (int64_t i = 0; i < k; i += kStep) {
            Vec pairs[16];
            for (int r = 0; r < 16; ++r) {
                const S* from = source + r * stride + i;
                if (std::is_same_v<S, bf16> && k - i >= kStep) {
                    std::memcpy(&pairs[r], from, 64);
                } else {
                    convert_exactly(rows[r], from, k - i < kStep ? k - i : kStep);
                    std::memcpy(&pairs[r], rows[r], 64);
                }
            }
            transpose(pairs);
            bf16* tile = panel + offset(first, i);
            for (int p = 0; p < 16; ++p) std::memcpy(tile + p * 32, &pairs[p], 64);
        }
    }

private:
    // Up to 32 elements and zeros; bfloat16 keeps its bits, whatever they mean.
    template <class S>
    static void convert_exactly(bf16* to, const S* from, int64_t n) {
        for (int64_t i = 0; i < 32; ++i) to[i] = bf16{0};
        for (int64_t i = 0; i < n; ++i) {
            if constexpr (std::is_same_v<S, bf16>) to[i] = from[i];
            else to[i] = from_float<bf16>(to_float(from[i]));
        }
    }
};

// Tiles 0 to 3 hold sums, [upper, lower rows] × [left, right columns]; 4 and 5 rows of x; 6 and 7 weights.
// While an object of it lives, the thread's tiles are shaped for `rows` rows.
class TileShapes {
public:
    explicit TileShapes(int rows) {
        alignas(64) Config config{};
        config.palette = 1;
        for (int t = 0; t < 8; ++t) {
            config.rows[t] = uint8_t(t < 6 ? rows : 16);
            config.column_bytes[t] = 64;
        }
        asm volatile("" ::: "memory");  // gcc believes the next line reads 8 bytes, and drops the stores to the rest
        _tile_loadconfig(&config);
    }
    ~TileShapes() { _tile_release(); }

private:
    struct Config {  // as the processor reads it
        uint8_t palette, start_row, reserved[14];
        uint16_t column_bytes[16];
        uint8_t rows[16];
    };
    static_assert(sizeof(Config) == 64);
};

// Fetches what comes next of a weight into L2, some lines at each step.
struct Ahead {
    const char* next;
    const char* end;
    int64_t lines;  // a step

    MINIVLLM_INLINE void step() {
        if (next >= end) return;
        for (int64_t i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    }
};

// sums: kTiles tiles one after the other, in the order of the tile registers. x: the tiles of 16 rows; those of
// the next 16 rows are `stride` further. A step is 32 of K.
template <int kTiles>
MINIVLLM_INLINE void load_sums(const float* sums, bool are_zero) {
    if (are_zero) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (kTiles == 4) {
            _tile_zero(2);
            _tile_zero(3);
        }
        return;
    }
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTileSums, 64);
    if constexpr (kTiles == 4) {
        _tile_loadd(2, sums + 2 * kTileSums, 64);
        _tile_loadd(3, sums + 3 * kTileSums, 64);
    }
}

template <int kTiles>
MINIVLLM_INLINE void store_sums(float* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTileSums, 64);
    if constexpr (kTiles == 4) {
        _tile_stored(2, sums + 2 * kTileSums, 64);
        _tile_stored(3, sums + 3 * kTileSums, 64);
    }
}

template <int kTiles>
MINIVLLM_INLINE void add_products(float* sums, bool are_zero, const bf16* x, int64_t stride, const bf16* w,
                                  int64_t steps, Ahead& ahead) {
    load_sums<kTiles>(sums, are_zero);
    for (int64_t s = 0; s < steps; ++s, x += kTile, w += 2 * kTile) {
        ahead.step();
        _tile_stream_loadd(4, x, 64);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTiles == 4) {
            _tile_stream_loadd(5, x + stride, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_sums<kTiles>(sums);
}

struct AmxKernel {
    using A = bf16;
    using Layout = AmxLayout;
    static constexpr int64_t kRows = 32;  // of x at a time

    // x as tiles, [rows/16][K/32][16][32]: read in the order they lie, where rows a power of two apart would share
    // a few cache sets. Rows beyond the last are whatever they are: they meet no other row.
    static Block<bf16> prepare(const LinearCall& call, int64_t first, int64_t num_rows) {
        const bf16* x = static_cast<const bf16*>(call.x) + first * call.x_stride;
        const int64_t k = round_up(call.k, Layout::kStep);
        bf16* tiles = static_cast<bf16*>(thread_scratch(0, round_up(num_rows, 16) * k * sizeof(bf16)));
        parallel_for(num_rows, 1 + 32768 / k, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const bf16* from = x + row * call.x_stride;
                bf16* to = tiles + row / 16 * 16 * k + row % 16 * 32;
                for (int64_t i = 0; i < k; i += 32, to += kTile)
                    convert_row(to, from + i, call.k - i < 32 ? call.k - i : 32, 32);
            }
        });
        return {tiles, num_rows, 16 * k, k};
    }

    static void run(const LinearCall& call, const Block<bf16>& block, int64_t first_row, int64_t first_panel,
                    int64_t end_panel) {
        const TileShapes tiles(block.num_rows < 16 ? int(block.num_rows) : 16);
        const int64_t size = panel_elements<Layout>(call.k);
        const bf16* packed = static_cast<const bf16*>(call.packed);
        const char* end = reinterpret_cast<const char*>(packed + end_panel * size);
        for (int64_t p = first_panel; p < end_panel; ++p) {
            const PanelEnd<2> panel_end(call, p);
            if (block.num_rows <= kRows) thin(panel_end, block, first_row, packed + p * size, end);
            else thick(panel_end, block, first_row, packed + p * size, end);
        }
    }

    // Up to 32 rows: a panel is read once, from memory as a rule.
    static void thin(const PanelEnd<2>& panel_end, const Block<bf16>& block, int64_t first_row, const bf16* panel,
                     const char* end) {
        alignas(64) float sums[4 * kTileSums];
        Ahead ahead{reinterpret_cast<const char*>(panel) + kAheadBytes, end, 32};
        product(sums, true, block, 0, 0, block.k / 32, panel, ahead);
        finish(panel_end, sums, block, 0, first_row);
    }

    static void thick(const PanelEnd<2>& panel_end, const Block<bf16>& block, int64_t first_row, const bf16* panel,
                      const char* end) {
        const int64_t steps = block.k / 32, num_chunks = (steps + kChunkSteps - 1) / kChunkSteps;
        const int64_t groups = (block.num_rows + kRows - 1) / kRows;
        float* sums = static_cast<float*>(thread_scratch(1, size_t(groups * 4 * kTileSums) * sizeof(float)));
        for (int64_t c = 0; c < num_chunks; ++c) {
            const int64_t begin = steps * c / num_chunks, stop = steps * (c + 1) / num_chunks;
            const bf16* chunk = panel + begin * 2 * kTile;
            const char* next = reinterpret_cast<const char*>(panel + stop * 2 * kTile);
            const char* last = next + (stop - begin) * 4 * kTile;
            Ahead ahead{next, last < end ? last : end, (32 + groups - 1) / groups};
            for (int64_t g = 0; g < groups; ++g) {
                float* group_sums = sums + g * 4 * kTileSums;
                product(group_sums, c == 0, block, g, begin, stop - begin, chunk, ahead);
                if (c + 1 == num_chunks) finish(panel_end, group_sums, block, g, first_row);
            }
        }
    }

    // Adds steps [first, first + steps) of K for the rows of group g.
    static MINIVLLM_INLINE void product(float* sums, bool are_zero, const Block<bf16>& block, int64_t g,
                                        int64_t first, int64_t steps, const bf16* w, Ahead& ahead) {
        const bf16* x = block.rows + 2 * g * block.stride + first * kTile;
        if (block.num_rows - g * kRows > 16) add_products<4>(sums, are_zero, x, block.stride, w, steps, ahead);
        else add_products<2>(sums, are_zero, x, block.stride, w, steps, ahead);
    }

    static void finish(const PanelEnd<2>& panel_end, const float* sums, const Block<bf16>& block, int64_t g,
                       int64_t first_row) {
        for (int64_t row = g * kRows; row < block.num_rows && row < (g + 1) * kRows; row += 16) {
            const int64_t rows = block.num_rows - row < 16 ? block.num_rows - row : 16;
            panel_end.finish(FloatSums{sums + row % kRows / 16 * 2 * kTileSums, 16, kTileSums}, first_row + row, rows);
        }
    }
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
