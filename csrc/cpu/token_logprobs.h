// Log-probabilities of given tokens. See minivllm/ops/token_logprobs.py.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace minivllm {

struct TokenLogprobs {
    float* values;           // [num_rows, num_tokens]: log-softmax there, -inf where the id is negative
    int64_t* ranks;          // [num_rows]: how many of the row's logits are at least as large as its first token's
    const float* logits;     // [num_rows, vocab_size], rows row_stride apart
    int64_t num_rows, vocab_size, row_stride;
    const int64_t* token_ids;  // [num_rows, num_tokens]
    int64_t num_tokens;
};

struct TokenLogprobsKernels {
    void (*run)(const TokenLogprobs&);
};
MINIVLLM_KERNELS(TokenLogprobsKernels, token_logprobs_kernels)

}  // namespace minivllm
