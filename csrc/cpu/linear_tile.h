// What the two families of linear kernels (fused multiply-add, AMX) share: panels, packing, the loop over blocks
// of rows, and the step from float32 sums to the output. Included by linear.cpp only; see isa.h.
//
// A packed weight is a row of panels; a panel holds `Layout::kPanel` output features, all of K, in the order the
// kernel reads it. Where an element lies depends on its own (n, k) alone, so rows can be packed in any order.
#pragma once

#include <type_traits>

#include "isa.h"
#include "linear.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;          // of x: half of a core's L2, so that a block stays while panels pass
constexpr int64_t kMultipliesPerThread = 1 << 16;  // below this, waking another thread costs more than it saves

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class Layout>
int64_t panel_elements(int64_t k) {
    return Layout::kPanel * round_up(k, Layout::kStep);
}

// Packs columns [first, last) of one panel from rows of S. K is padded with zeros to the layout's step: the
// padding of x is zero too, but 0 × (whatever was there) need not be.
template <class Layout, class W, class S>
void pack_panel(W* panel, const S* source, int64_t source_stride, int64_t first, int64_t last, int64_t k) {
    constexpr int64_t kBlock = 256;  // a block of a panel stays in cache while its columns are written
    const int64_t padded = round_up(k, Layout::kStep);
    for (int64_t begin = 0; begin < padded; begin += kBlock) {
        const int64_t end = begin + kBlock < padded ? begin + kBlock : padded;
        const int64_t real = end < k ? end : k;
        for (int64_t column = first; column < last; ++column) {
            const S* row = source + (column - first) * source_stride;
            for (int64_t i = begin; i < real; ++i) {
                W& to = panel[Layout::offset(column, i)];
                if constexpr (sizeof(to) == 2 && std::is_same_v<W, S>) to = row[i];
                else to = from_float<W>(to_float(row[i]));
            }
            for (int64_t i = real; i < end; ++i) panel[Layout::offset(column, i)] = from_float<W>(0.0f);
        }
    }
}

template <class Layout, class W>
void load_rows(void* packed, const WeightRows& rows) {
    const int64_t first_panel = rows.start / Layout::kPanel;
    const int64_t end = rows.start + rows.rows;
    with_dtype(rows.source_dtype, [&](auto tag) {
        using S = typename decltype(tag)::type;
        parallel_for((end - 1) / Layout::kPanel - first_panel + 1, 1, [&](int64_t begin_panel, int64_t end_panel) {
            for (int64_t p = first_panel + begin_panel; p < first_panel + end_panel; ++p) {
                const int64_t base = p * Layout::kPanel;
                const int64_t first = rows.start > base ? rows.start - base : 0;
                const int64_t last = end - base < Layout::kPanel ? end - base : Layout::kPanel;
                const S* source = static_cast<const S*>(rows.source) + (base + first - rows.start) * rows.source_stride;
                pack_panel<Layout>(static_cast<W*>(packed) + p * panel_elements<Layout>(rows.k), source,
                                   rows.source_stride, first, last, rows.k);
            }
        });
    });
}

template <class Layout, class W>
void gather_rows(void* out, const void* packed, int64_t k, const int64_t* ids, int64_t num_ids) {
    parallel_for(num_ids, 1 + 4096 / k, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const W* panel = static_cast<const W*>(packed) + ids[i] / Layout::kPanel * panel_elements<Layout>(k);
            W* to = static_cast<W*>(out) + i * k;
            for (int64_t j = 0; j < k; ++j) to[j] = panel[Layout::offset(ids[i] % Layout::kPanel, j)];
        }
    });
}

// Rows of x in the type, and with the padding of K, that a kernel reads.
template <class A>
struct Block {
    const A* rows;
    int64_t num_rows, stride, k;  // k includes the padding
};

// Converts n elements of x and adds zeros up to `padded`.
template <class A, class X>
MINIVLLM_INLINE void convert_row(A* to, const X* from, int64_t n, int64_t padded) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = from_float<A>(to_float(from[i]));
    for (; i < padded; ++i) to[i] = from_float<A>(0.0f);
}

// The bias of one panel in float32, zeros where there is none.
inline void load_bias(float* bias, const LinearCall& call, int64_t first, int64_t width) {
    for (int64_t i = 0; i < width; ++i) bias[i] = 0.0f;
    if (call.bias == nullptr) return;
    with_dtype(call.bias_dtype, [&](auto tag) {
        using B = typename decltype(tag)::type;
        for (int64_t i = 0; i < width && first + i < call.n; ++i)
            bias[i] = to_float(static_cast<const B*>(call.bias)[first + i]);
    });
}

// Adds the bias to a tile of sums and rounds once, into out[row..][column..]; columns beyond n are dropped.
inline void finish_tile(const LinearCall& call, const float* sums, int64_t sums_stride, const float* bias, int64_t row,
                        int64_t num_rows, int64_t column, int64_t width) {
    const int64_t columns = call.n - column < width ? call.n - column : width;
    with_dtype(call.out_dtype, [&](auto tag) {
        using Y = typename decltype(tag)::type;
        for (int64_t r = 0; r < num_rows; ++r) {
            Y* out = static_cast<Y*>(call.out) + (row + r) * call.n + column;
            const float* in = sums + r * sums_stride;
            int64_t i = 0;
            for (; i + kLanes <= columns; i += kLanes) store(out + i, load(in + i) + load(bias + i));
            if (const int rest = int(columns - i); rest > 0)
                store_partial(out + i, load_partial(in + i, rest) + load_partial(bias + i, rest), rest);
        }
    });
}

// Kernel::prepare(call, first_row, num_rows) for blocks of rows that fit in L2, then
// Kernel::run(call, block, first_row, first_panel, end_panel), panels split over threads. Each output is one
// thread's, and is summed over all of K in the kernel's own order: neither the blocks nor the threads can be seen
// in the result.
template <class Kernel>
void multiply_blocks(const LinearCall& call) {
    using A = typename Kernel::A;
    using Layout = typename Kernel::Layout;
    const int64_t padded = round_up(call.k, Layout::kStep);
    const int64_t fitting = kBlockBytes / (padded * int64_t(sizeof(A))) / Kernel::kRows * Kernel::kRows;
    const int64_t block_rows = fitting > Kernel::kRows ? fitting : Kernel::kRows;
    const int64_t num_panels = round_up(call.n, Layout::kPanel) / Layout::kPanel;
    for (int64_t first = 0; first < call.m; first += block_rows) {
        const int64_t rows = call.m - first < block_rows ? call.m - first : block_rows;
        const Block<A> block = Kernel::prepare(call, first, rows);
        const int64_t grain = 1 + kMultipliesPerThread / (rows * padded * Layout::kPanel);
        parallel_for(num_panels, grain,
                     [&](int64_t begin, int64_t end) { Kernel::run(call, block, first, begin, end); });
    }
}

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
