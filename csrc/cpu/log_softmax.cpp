#include "log_softmax.h"

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

Partial merge(const Partial* parts, int64_t n) {
    float top = -kInfinity;
    for (int64_t i = 0; i < n; ++i) top = parts[i].max > top ? parts[i].max : top;
    double sum = 0;
    for (int64_t i = 0; i < n; ++i)
        if (parts[i].sum != 0) sum += double(parts[i].sum) * __builtin_exp(double(parts[i].max) - double(top));
    return {top, float(__builtin_log(sum))};
}

void log_softmax(float* out, const float* logits, int64_t num_rows, int64_t vocab_size, int64_t row_stride) {
    const Chunks chunks{logits, num_rows, vocab_size, row_stride};
    auto* parts = static_cast<Partial*>(thread_scratch(0, size_t(chunks.count() + num_rows) * sizeof(Partial)));
    Partial* rows = parts + chunks.count();  // max and log of the sum
    parallel_tasks(chunks.count(), [&](int64_t i) { parts[i] = reduce_chunk(chunks.data(i), chunks.size(i)); });
    for (int64_t r = 0; r < num_rows; ++r) rows[r] = merge(parts + r * chunks.per_row(), chunks.per_row());
    parallel_tasks(chunks.count(), [&](int64_t i) {
        const Vec top = set1(rows[chunks.row(i)].max), log_sum = set1(rows[chunks.row(i)].sum);
        float* to = out + chunks.row(i) * vocab_size + chunks.begin(i);
        const int64_t n = chunks.size(i);
        for_vectors(chunks.data(i), n, [&](Vec v, int64_t j) {
            const Vec y = v - top - log_sum;
            if (n - j >= kLanes) store(to + j, y);
            else store_partial(to + j, y, int(n - j));
        });
    });
}

}  // namespace

const LogSoftmaxKernels log_softmax_kernels = {&log_softmax};

}  // namespace minivllm::MINIVLLM_ISA
