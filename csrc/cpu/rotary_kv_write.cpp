// Norms of heads, rotation and cache write of some tokens at a time: what is read from memory once is still in the
// cache when it is written. Tokens are split over threads; a token stands alone.
#include "rotary_kv_write.h"

#include "rotary_heads.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr int64_t kMostTogether = 16;  // tokens

// Where the tokens from `begin` on that are done together end: before the next that may fill half a tile with those behind.
int64_t block_end(const int64_t* slots, int64_t begin, int64_t end) {
    int64_t i = begin + 1;
    while (i < end && i < begin + kMostTogether && slots[i] % 16 != 0) ++i;
    return i;
}

void run(const Heads& q, const Heads& k, const KvWrite& write, float eps, const int64_t* positions,
         const float* cos_sin, int64_t rot_dim) {
    const int64_t head_dim = write.layout.head_dim, row = k.num_heads * head_dim;
    const int64_t elements = (q.num_heads + 2 * k.num_heads) * head_dim;
    with_dtype(write.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(write.num_tokens, 1 + 8192 / elements, [&](int64_t begin, int64_t end) {
            T* turned = static_cast<T*>(thread_scratch(1, size_t(kMostTogether * row) * sizeof(T)));
            KvWrite part = write;
            part.k_token_stride = row * int64_t(sizeof(T));
            part.k_head_stride = head_dim * int64_t(sizeof(T));
            for (int64_t first = begin, last; first < end; first = last) {
                last = block_end(write.slots, first, end);
                for (int64_t token = first; token < last; ++token) {
                    const float* angles = cos_sin + positions[token] * rot_dim;
                    rotate_in_place<T>(q, head_dim, eps, token, angles, rot_dim / 2);
                    rotate_heads(turned + (token - first) * row, head_dim, k, head_dim, eps, token, angles,
                                 rot_dim / 2);
                }
                part.k = reinterpret_cast<const char*>(turned - first * row);
                kv_write_kernels.rows(part, first, last);
            }
        });
    });
}

}  // namespace

const RotaryKvWriteKernels rotary_kv_write_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
