#include "token_logprobs.h"

#include <array>
#include <stdexcept>
#include <string>

#include <nanobind/stl/array.h>

#include "../bindings.h"

namespace minivllm {

using Shape = std::array<int64_t, 2>;

static void token_logprobs(uintptr_t values, uintptr_t ranks, uintptr_t logits, Shape shape, int64_t row_stride,
                           uintptr_t token_ids, int64_t num_tokens) {
    const auto* ids = ptr<const int64_t>(token_ids);
    if (num_tokens < 1) throw std::invalid_argument("token_ids has no column; the first one's rank is wanted");
    for (int64_t i = 0; i < shape[0] * num_tokens; ++i)
        if (ids[i] >= shape[1] || (ids[i] < 0 && i % num_tokens == 0))
            throw std::out_of_range("token " + std::to_string(ids[i]) + " lies outside the vocabulary of " +
                                    std::to_string(shape[1]));
    token_logprobs_kernels().run({ptr<float>(values), ptr<int64_t>(ranks), ptr<const float>(logits), shape[0], shape[1],
                                  row_stride, ids, num_tokens});
}

MINIVLLM_BIND(token_logprobs, m) { def_op(m, "token_logprobs", &token_logprobs); }

}  // namespace minivllm
