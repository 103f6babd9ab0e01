// RMSNorm of one row, for the norm itself and for what it is fused with. Included by kernel files only; see isa.h.
//
// The sum of squares runs over four vectors of partial sums, whoever asks and whatever the number of rows.
#pragma once

#include "isa.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

template <class T>
float sum_of_squares(const T* x, int64_t n) {
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        for (int j = 0; j < 4; ++j) {
            const Vec v = load(x + i + j * kLanes);
            sums[j] = fma(v, v, sums[j]);
        }
    for (int j = 0; i < n; i += kLanes, ++j) {
        const Vec v = n - i >= kLanes ? load(x + i) : load_partial(x + i, int(n - i));
        sums[j] = fma(v, v, sums[j]);
    }
    return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out may be x. rounded<W>: to the weight's type before it multiplies; nothing for float32.
template <class T, class W>
void norm_row(T* out, const T* x, const W* weight, int64_t n, float eps) {
    const Vec scale = set1(1.0f / __builtin_sqrtf(sum_of_squares(x, n) / float(n) + eps));
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, rounded<W>(load(x + i) * scale) * load(weight + i));
    if (const int rest = int(n - i); rest > 0)
        store_partial(out + i, rounded<W>(load_partial(x + i, rest) * scale) * load_partial(weight + i, rest), rest);
}

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
