// Reductions over the vocabulary. See minivllm/ops/log_softmax.py.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace minivllm {

struct LogSoftmaxKernels {
    // out [num_rows, vocab_size] contiguous; logits rows lie row_stride apart.
    void (*log_softmax)(float* out, const float* logits, int64_t num_rows, int64_t vocab_size, int64_t row_stride);
};
MINIVLLM_KERNELS(LogSoftmaxKernels, log_softmax_kernels)

}  // namespace minivllm
