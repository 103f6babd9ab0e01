// Two linear layers, of which the second multiplies what the first gives and nobody else reads: some rows go through
// both, then the next, so that what lies between is still in the cache. A row's arithmetic is that of one after the
// other.
#pragma once

#include <cstdint>

#include "linear.h"
#include "thread_pool.h"

namespace minivllm {

// Of `call`, rows [first, first + rows) alone.
inline LinearCall rows_of(const LinearCall& call, int64_t first, int64_t rows) {
    LinearCall part = call;
    part.m = rows;
    if (call.x != nullptr)
        part.x = static_cast<const char*>(call.x) + first * call.x_stride * size_of(call.dtype);
    if (call.out != nullptr)
        part.out = static_cast<char*>(call.out) + first * call.out_stride * size_of(call.out_dtype);
    if (call.addend != nullptr) part.addend = call.addend + first * call.addend_stride;
    return part;
}

// first.out and second.x are null. The second's output may be the first's input: a row of it is written when
// all that reads it is done.
inline void multiply_pair(const LinearKernels& kernels, const LinearCall& first, const LinearKernels& second_kernels,
                          const LinearCall& second) {
    constexpr int64_t kMostRows = 256;  // measured: enough for a thread to read both weights meanwhile
    const int64_t m = first.m, width = second.k;
    const auto multiply_rows = [&](int64_t begin, int64_t rows) {
        void* between = thread_scratch(3, size_t(rows * width * size_of(second.dtype)));
        LinearCall to = rows_of(first, begin, rows), from = rows_of(second, begin, rows);
        to.out = between, to.out_dtype = second.dtype, to.out_stride = width;
        from.x = between, from.x_stride = width;
        kernels.multiply(to);
        second_kernels.multiply(from);
    };
    const int64_t threads = num_threads();
    // Each part is one thread's; else all share each.
    const bool is_one_thread = threads > 1 && m >= kMostRows * threads;
    int64_t parts = (m + kMostRows - 1) / kMostRows;
    if (is_one_thread) parts = (parts + threads - 1) / threads * threads;
    const auto begin_of = [&](int64_t part) { return (m + 31) / 32 * part / parts * 32; };  // whole groups of rows
    const auto multiply_part = [&](int64_t part) {
        const int64_t begin = begin_of(part), end = begin_of(part + 1);
        multiply_rows(begin, (end < m ? end : m) - begin);
    };
    if (is_one_thread) return parallel_tasks(parts, multiply_part);
    for (int64_t part = 0; part < parts; ++part) multiply_part(part);
}

}  // namespace minivllm
