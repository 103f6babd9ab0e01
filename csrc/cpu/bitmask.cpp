#include "bitmask.h"

#include "vocab.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr float kMasked = -__builtin_inff();

// The 32 tokens of a word, or the first n of them. Most words allow all or nothing.
MINIVLLM_INLINE void mask_word(float* x, uint32_t word, int n) {
    if (word == 0xffffffffu) return;
    if (word == 0) {
        for (int t = 0; t < n; ++t) x[t] = kMasked;
        return;
    }
    for (int t = 0; t < n; ++t) x[t] = (word >> t & 1u) != 0 ? x[t] : kMasked;
}

void apply(float* logits, int64_t vocab_size, int64_t row_stride, const int64_t* rows, int64_t num_masked,
           const uint32_t* bits, int64_t num_words) {
    static_assert(kVocabChunk % 32 == 0, "a chunk ends where a word does");
    const int64_t per_row = num_chunks(vocab_size);
    parallel_tasks(num_masked * per_row, [&](int64_t i) {
        const int64_t k = i / per_row, begin = i % per_row * kVocabChunk;
        const int64_t end = begin + kVocabChunk < vocab_size ? begin + kVocabChunk : vocab_size;
        float* x = logits + rows[k] * row_stride;
        const uint32_t* words = bits + k * num_words;
        for (int64_t t = begin; t < end; t += 32)
            mask_word(x + t, words[t / 32], end - t < 32 ? int(end - t) : 32);
    });
}

}  // namespace

const BitmaskKernels bitmask_kernels = {&apply};

}  // namespace minivllm::MINIVLLM_ISA
