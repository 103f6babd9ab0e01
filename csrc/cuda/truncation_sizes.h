// What a truncation is told: rows of logits and what each row asks for.
#pragma once

#include <cstdint>

namespace minivllm::cuda {

constexpr int kMostTokens = 1 << 19;

struct Truncation {
    float* logits;
    const int32_t* top_k;  // 0: off
    const float* top_p;    // 1: off
    const float* min_p;    // 0: off
    int64_t row_stride;
    int vocab_size;  // at most kMostTokens
};

}  // namespace minivllm::cuda
