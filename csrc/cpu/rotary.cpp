// Rotary embedding, halves paired ("neox"), with or without the norm of each head before it. Tokens are split over threads.
#include "rotary.h"

#include "rotary_heads.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

void run(DType dtype, Heads q, Heads k, int64_t head_dim, float eps, const int64_t* positions, int64_t num_tokens,
         const float* cos_sin, int64_t rot_dim) {
    const int64_t elements = (q.num_heads + k.num_heads) * rot_dim;
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(num_tokens, 1 + 8192 / (elements + 1), [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) {
                const float* row = cos_sin + positions[token] * rot_dim;
                rotate_in_place<T>(q, head_dim, eps, token, row, rot_dim / 2);
                rotate_in_place<T>(k, head_dim, eps, token, row, rot_dim / 2);
            }
        });
    });
}

}  // namespace

const RotaryKernels rotary_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
