#include "rotary.h"

#include <stdexcept>

#include "../bindings.h"

namespace minivllm {

void check_positions(const int64_t* positions, int64_t n, int64_t max_position) {
    for (int64_t i = 0; i < n; ++i)
        if (positions[i] < 0 || positions[i] >= max_position)
            throw std::out_of_range("position " + std::to_string(positions[i]) + " is outside the rotary table of " +
                                    std::to_string(max_position));
}

MINIVLLM_BIND(rotary, m) {
    def_op(m, "rotary", [](int dtype, uintptr_t q, int64_t q_heads, int64_t q_token_stride, int64_t q_head_stride,
                       uintptr_t q_norm, uintptr_t k, int64_t k_heads, int64_t k_token_stride, int64_t k_head_stride,
                       uintptr_t k_norm, int64_t head_dim, float eps, uintptr_t positions, int64_t num_tokens,
                       uintptr_t cos_sin, int64_t max_position, int64_t rot_dim) {
        check_positions(ptr<const int64_t>(positions), num_tokens, max_position);
        rotary_kernels().run(
            DType(dtype), {ptr<void>(q), q_heads, q_token_stride, q_head_stride, ptr<const void>(q_norm)},
            {ptr<void>(k), k_heads, k_token_stride, k_head_stride, ptr<const void>(k_norm)}, head_dim, eps,
            ptr<const int64_t>(positions), num_tokens, ptr<const float>(cos_sin), rot_dim);
    });
}

}  // namespace minivllm
