// Masking logits by bits. See minivllm/ops/bitmask.py.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace minivllm {

struct BitmaskKernels {
    // rows[k] of logits is masked by bits[k * num_words, …): bit t % 32 of word t / 32 is token t's.
    void (*apply)(float* logits, int64_t vocab_size, int64_t row_stride, const int64_t* rows, int64_t num_masked,
                  const uint32_t* bits, int64_t num_words);
};
MINIVLLM_KERNELS(BitmaskKernels, bitmask_kernels)

}  // namespace minivllm
