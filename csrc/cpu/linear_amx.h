// Linear layers in bfloat16 on AMX tiles. Included by linear.cpp only.
//
// A tile product adds, for each of 16 rows and 16 columns, 16 pairs of products to a float32 sum, in an order
// that is the processor's and the same for every row, however many rows the tile has. K goes up in steps of 32.
// Subnormal inputs and results count as zero, as always with AMX.
#pragma once

#include "linear_tile.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// [K/32][2 column groups][16 pairs of k][16 columns][2]: each [16][16][2] is one tile, 1 KiB.
struct AmxLayout {
    static constexpr int64_t kPanel = 32, kStep = 32;
    static MINIVLLM_INLINE int64_t offset(int64_t column, int64_t k) {
        return k / 32 * 1024 + column / 16 * 512 + k % 32 / 2 * 32 + column % 16 * 2 + k % 2;
    }
};

// Tiles 0 to 3 hold sums, [upper, lower rows] × [left, right columns]; 4 and 5 rows of x; 6 and 7 weights.
// While an object of it lives, the thread's tiles are shaped for `upper` + `lower` rows.
class TileShapes {
public:
    ~TileShapes() { _tile_release(); }

    void shape_for(int upper, int lower) {
        if (upper == upper_ && lower == lower_) return;
        upper_ = upper;
        lower_ = lower;
        alignas(64) Config config{};
        config.palette = 1;
        for (int t = 0; t < 8; ++t) {
            config.rows[t] = 16;
            config.column_bytes[t] = 64;
        }
        config.rows[0] = config.rows[1] = config.rows[4] = uint8_t(upper);
        config.rows[2] = config.rows[3] = config.rows[5] = uint8_t(lower > 0 ? lower : 1);
        asm volatile("" ::: "memory");  // gcc believes the next line reads 8 bytes, and drops the stores to the rest
        _tile_loadconfig(&config);
    }

private:
    struct Config {  // as the processor reads it
        uint8_t palette, start_row, reserved[14];
        uint16_t column_bytes[16];
        uint8_t rows[16];
    };
    static_assert(sizeof(Config) == 64);
    int upper_ = 0, lower_ = 0;
};

struct AmxKernel {
    using A = bf16;
    using Layout = AmxLayout;
    static constexpr int64_t kRows = 32;  // of x at a time

    // x as tiles, [rows/16][K/32][16][32]: read in the order they lie, where rows a power of two apart would share
    // a few cache sets.
    static Block<bf16> prepare(const LinearCall& call, int64_t first, int64_t num_rows) {
        const bf16* x = static_cast<const bf16*>(call.x) + first * call.x_stride;
        const int64_t k = round_up(call.k, Layout::kStep);
        bf16* tiles = static_cast<bf16*>(thread_scratch(0, round_up(num_rows, 16) * k * sizeof(bf16)));
        parallel_for(num_rows, 1 + 32768 / k, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const bf16* from = x + row * call.x_stride;
                bf16* to = tiles + row / 16 * 16 * k + row % 16 * 32;
                for (int64_t i = 0; i < k; i += 32, to += 512)
                    convert_row(to, from + i, call.k - i < 32 ? call.k - i : 32, 32);
            }
        });
        return {tiles, num_rows, 16 * k, k};
    }

    static void run(const LinearCall& call, const Block<bf16>& block, int64_t first_row, int64_t first_panel,
                    int64_t end_panel) {
        alignas(64) float sums[32 * 32];
        alignas(64) float bias[32];
        TileShapes tiles;
        for (int64_t p = first_panel; p < end_panel; ++p) {
            const bf16* panel = static_cast<const bf16*>(call.packed) + p * panel_elements<Layout>(call.k);
            load_bias(bias, call, p * Layout::kPanel, Layout::kPanel);
            for (int64_t row = 0; row < block.num_rows; row += kRows) {
                const int rows = int(block.num_rows - row < kRows ? block.num_rows - row : kRows);
                const bf16* x = block.rows + row / 16 * block.stride;
                if (rows > 16) {
                    tiles.shape_for(16, rows - 16);
                    two_by_two(sums, x, block.stride, panel);
                } else {
                    tiles.shape_for(rows, 0);
                    one_by_two(sums, x, block.stride, panel);
                }
                finish_tile(call, sums, 32, bias, first_row + row, rows, p * Layout::kPanel, Layout::kPanel);
            }
        }
    }

    // x: the tiles of 16 rows, `stride` elements in all; the next 16 rows' follow.
    static MINIVLLM_INLINE void two_by_two(float* sums, const bf16* x, int64_t stride, const bf16* panel) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (const bf16* end = x + stride; x != end; x += 512, panel += 1024) {
            _tile_loadd(4, x, 64);
            _tile_loadd(6, panel, 64);
            _tile_loadd(7, panel + 512, 64);
            _tile_loadd(5, x + stride, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, 128);
        _tile_stored(1, sums + 16, 128);
        _tile_stored(2, sums + 16 * 32, 128);
        _tile_stored(3, sums + 16 * 32 + 16, 128);
    }

    static MINIVLLM_INLINE void one_by_two(float* sums, const bf16* x, int64_t stride, const bf16* panel) {
        _tile_zero(0);
        _tile_zero(1);
        for (const bf16* end = x + stride; x != end; x += 512, panel += 1024) {
            _tile_loadd(4, x, 64);
            _tile_loadd(6, panel, 64);
            _tile_loadd(7, panel + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, sums, 128);
        _tile_stored(1, sums + 16, 128);
    }
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
