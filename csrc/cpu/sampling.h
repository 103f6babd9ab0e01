// Choosing the next token. See minivllm/ops/sampling.py for the meaning of each argument.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace minivllm {

struct Logits {
    float* data;  // [num_rows, vocab_size], rows row_stride apart
    int64_t num_rows, vocab_size, row_stride;
};

struct SamplingKernels {
    // broken: 1 for a row no token can be drawn from, as nonfinite_rows says.
    void (*gumbel_argmax)(int64_t* out, uint8_t* broken, const Logits& logits, const float* temperature,
                          const uint64_t* seeds, const uint64_t* positions, uint32_t purpose);
    // log_ratio: per row, how far below the maximum min_p lets a logit lie; -inf for off.
    void (*top_k_top_p_min_p)(const Logits& logits, const int32_t* top_k, const float* top_p, const float* log_ratio);
    void (*nonfinite_rows)(uint8_t* out, const Logits& logits);  // 1 for a row no token can be drawn from
    // One Philox4x32-10 block, for tests: counter and key as four and two words; words in out[0..3].
    void (*philox)(uint32_t* out, const uint32_t* counter, const uint32_t* key);
};
MINIVLLM_KERNELS(SamplingKernels, sampling_kernels)

}  // namespace minivllm
