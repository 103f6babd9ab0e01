// Rotary embedding, halves paired ("neox"), with or without the norm of each head before it. Heads stand alone;
// tokens are split over threads.
#include "rotary.h"

#include "isa.h"
#include "rms_norm_row.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// (first, second) becomes (first·cos − second·sin, second·cos + first·sin).
template <class T>
void rotate(T* first, T* second, const float* cos, const float* sin, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Vec a = load(first + i), b = load(second + i), c = load(cos + i), s = load(sin + i);
        store(first + i, a * c - b * s);
        store(second + i, b * c + a * s);
    }
    if (const int rest = int(n - i); rest > 0) {
        const Vec a = load_partial(first + i, rest), b = load_partial(second + i, rest);
        const Vec c = load_partial(cos + i, rest), s = load_partial(sin + i, rest);
        store_partial(first + i, a * c - b * s, rest);
        store_partial(second + i, b * c + a * s, rest);
    }
}

// One vector of a head as it is stored, in float32. On AMX, where sums that become heads have no subnormals, by the
// instruction that has none either: it is one where there are nine.
template <class T>
MINIVLLM_INLINE Vec stored(Vec x) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) return widen_bf16((__m256i)_mm512_cvtneps_pbh(x.v));
#endif
    return rounded<T>(x);
}
template <class T>
MINIVLLM_INLINE void put(T* to, Vec x) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>)
        return _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x.v));
#endif
    store(to, x);
}

// norm_row (unless there is no weight) and rotate, operation by operation, of a whole head that stays in registers.
template <class T, int kVecs>
void turn_heads(const Heads& heads, float eps, int64_t token, const float* cos_sin) {
    constexpr int kHalf = kVecs / 2, kHeadDim = kVecs * kLanes;
    T* x = static_cast<T*>(heads.x) + token * heads.token_stride;
    const T* weight = static_cast<const T*>(heads.norm_weight);
    for (int64_t head = 0; head < heads.num_heads; ++head, x += heads.head_stride) {
        Vec v[kVecs];
        for (int i = 0; i < kVecs; ++i) v[i] = load(x + i * kLanes);
        if (weight != nullptr) {
            Vec sums[4] = {zero(), zero(), zero(), zero()};
            for (int i = 0; i < kVecs; ++i) sums[i % 4] = fma(v[i], v[i], sums[i % 4]);
            const float sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
            const Vec scale = set1(1.0f / __builtin_sqrtf(sum / float(kHeadDim) + eps));
            for (int i = 0; i < kVecs; ++i)
                v[i] = stored<T>(stored<T>(v[i] * scale) * load(weight + i * kLanes));
        }
        for (int i = 0; i < kHalf; ++i) {
            const Vec c = load(cos_sin + i * kLanes), s = load(cos_sin + (kHalf + i) * kLanes);
            put(x + i * kLanes, v[i] * c - v[kHalf + i] * s);
            put(x + (kHalf + i) * kLanes, v[kHalf + i] * c + v[i] * s);
        }
    }
}

template <class T>
void rotate_heads(const Heads& heads, int64_t head_dim, float eps, int64_t token, const float* cos_sin, int64_t half) {
    if (head_dim == 2 * half && head_dim == 8 * kLanes) return turn_heads<T, 8>(heads, eps, token, cos_sin);
    if (head_dim == 2 * half && head_dim == 4 * kLanes) return turn_heads<T, 4>(heads, eps, token, cos_sin);
    T* x = static_cast<T*>(heads.x) + token * heads.token_stride;
    for (int64_t head = 0; head < heads.num_heads; ++head, x += heads.head_stride) {
        if (heads.norm_weight != nullptr) norm_row(x, x, static_cast<const T*>(heads.norm_weight), head_dim, eps);
        rotate(x, x + half, cos_sin, cos_sin + half, half);
    }
}

void run(DType dtype, Heads q, Heads k, int64_t head_dim, float eps, const int64_t* positions, int64_t num_tokens,
         const float* cos_sin, int64_t rot_dim) {
    const int64_t elements = (q.num_heads + k.num_heads) * rot_dim;
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(num_tokens, 1 + 8192 / (elements + 1), [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) {
                const float* row = cos_sin + positions[token] * rot_dim;
                rotate_heads<T>(q, head_dim, eps, token, row, rot_dim / 2);
                rotate_heads<T>(k, head_dim, eps, token, row, rot_dim / 2);
            }
        });
    });
}

}  // namespace

const RotaryKernels rotary_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
