#include "token_logprobs.h"

#include "vocab.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// max and the sum of e^(x - max) of a chunk.
struct Partial {
    float max, sum;
};

Partial reduce_chunk(const float* x, int64_t n) {
    const float top = largest(x, n);
    if (top == -kInfinity) return {top, 0.0f};  // all masked: e^(-inf + inf) would be NaN
    Vec sums[4] = {zero(), zero(), zero(), zero()};  // short chains lose fewer bits
    for_vectors(x, n, [&](Vec v, int64_t i) {
        Vec& sum = sums[i / kLanes % 4];
        sum = sum + exp(v - set1(top));
    });
    return {top, reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]))};
}

// max and the logarithm of the sum of e^(x - max), of all chunks of a row.
Partial merge(const Partial* parts, int64_t n) {
    float top = -kInfinity;
    for (int64_t i = 0; i < n; ++i) top = parts[i].max > top ? parts[i].max : top;
    double sum = 0;
    for (int64_t i = 0; i < n; ++i)
        if (parts[i].sum != 0) sum += double(parts[i].sum) * __builtin_exp(double(parts[i].max) - double(top));
    return {top, float(__builtin_log(sum))};
}

int64_t count_at_least(float least, const float* x, int64_t n) {
    int64_t count = 0;
    for_vectors(x, n, [&](Vec v, int64_t i) {
        const uint32_t inside = n - i < kLanes ? (1u << (n - i)) - 1 : kAllLanes;
        count += __builtin_popcount(lanes_at_least(v, set1(least)) & inside);
    });
    return count;
}

// Both passes over a chunk, one after the other: the second finds it in the cache.
void run(const TokenLogprobs& t) {
    const Chunks chunks{t.logits, t.num_rows, t.vocab_size, t.row_stride};
    const size_t bytes = size_t(chunks.count()) * (sizeof(Partial) + sizeof(int64_t));
    auto* parts = static_cast<Partial*>(thread_scratch(0, bytes));
    auto* counts = reinterpret_cast<int64_t*>(parts + chunks.count());
    parallel_tasks(chunks.count(), [&](int64_t i) {
        const int64_t row = chunks.row(i);
        parts[i] = reduce_chunk(chunks.data(i), chunks.size(i));
        counts[i] = count_at_least(t.logits[row * t.row_stride + t.token_ids[row * t.num_tokens]], chunks.data(i),
                                   chunks.size(i));
    });
    for (int64_t row = 0; row < t.num_rows; ++row) {
        const int64_t first = row * chunks.per_row();
        const Partial whole = merge(parts + first, chunks.per_row());
        t.ranks[row] = 0;
        for (int64_t c = first; c < first + chunks.per_row(); ++c) t.ranks[row] += counts[c];
        for (int64_t j = row * t.num_tokens; j < (row + 1) * t.num_tokens; ++j) {
            const int64_t id = t.token_ids[j];
            t.values[j] = id < 0 ? -kInfinity : t.logits[row * t.row_stride + id] - whole.max - whole.sum;
        }
    }
}

}  // namespace

const TokenLogprobsKernels token_logprobs_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
