// Walking a row of logits in fixed chunks. A chunk's result is a function of its own numbers, and chunks are merged
// in ascending order: who computes which changes nothing.
#pragma once

#include "thread_pool.h"
#include "vec_math.h"

namespace minivllm::MINIVLLM_ISA {

constexpr int64_t kVocabChunk = 4096;

// The largest value of a chunk or row and the lowest index that holds it.
struct Peak {
    float value;
    int64_t index;
};

MINIVLLM_INLINE bool beats(const Peak& a, const Peak& b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
}

MINIVLLM_INLINE int64_t num_chunks(int64_t vocab_size) { return (vocab_size + kVocabChunk - 1) / kVocabChunk; }

// The chunks of a matrix of logits, numbered row by row.
struct Chunks {
    const float* logits;
    int64_t num_rows, vocab_size, row_stride;

    int64_t per_row() const { return num_chunks(vocab_size); }
    int64_t count() const { return num_rows * per_row(); }
    int64_t row(int64_t i) const { return i / per_row(); }
    int64_t begin(int64_t i) const { return i % per_row() * kVocabChunk; }
    int64_t size(int64_t i) const {
        const int64_t left = vocab_size - begin(i);
        return left < kVocabChunk ? left : kVocabChunk;
    }
    const float* data(int64_t i) const { return logits + row(i) * row_stride + begin(i); }
};

// Calls fn(vector, offset) over x[0, n); lanes beyond n hold -inf.
template <class F>
MINIVLLM_INLINE void for_vectors(const float* x, int64_t n, const F& fn) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) fn(load(x + i), i);
    if (i < n) fn(load_first(x + i, int(n - i), -kInfinity), i);
}

// NaNs are passed over, as far as the vectors' max does; a row that holds one is not to be used.
MINIVLLM_INLINE float largest(const float* x, int64_t n) {
    Vec m = set1(-kInfinity);
    for_vectors(x, n, [&](Vec v, int64_t) { m = max(v, m); });
    return reduce_max(m);
}

inline int64_t first_index_of(float value, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const int width = n - i < kLanes ? int(n - i) : kLanes;
        const uint32_t found = lanes_equal(load_partial(x + i, width), set1(value)) & ((1u << width) - 1);
        if (found != 0) return i + __builtin_ctz(found);
    }
    return 0;
}

}  // namespace minivllm::MINIVLLM_ISA
