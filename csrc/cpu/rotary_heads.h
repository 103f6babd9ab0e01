// The heads of one token, normed and turned, for the rotation itself and for what it is fused with. Included by kernel
// files only; see isa.h. Heads stand alone: where they are put changes no bit of them.
#pragma once

#include "isa.h"
#include "rms_norm_row.h"
#include "rotary.h"

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

#if defined(__AVX512F__)
MINIVLLM_INLINE Vec sqrt(Vec x) { return {_mm512_sqrt_ps(x.v)}; }
#else
MINIVLLM_INLINE Vec sqrt(Vec x) { return {_mm256_sqrt_ps(x.v)}; }
#endif

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

// 1 / sqrt(mean of squares + eps) of up to kLanes whole heads, as norm_row scales each. One square root for all, and
// no head's turning waits for its own sum.
template <class T, int kVecs>
void scales_of(float* scales, const T* x, int64_t stride, int64_t num, float eps) {
    for (int64_t head = 0; head < num; ++head, x += stride) scales[head] = sum_of_squares(x, kVecs * kLanes);
    store(scales, set1(1.0f) / sqrt(load(scales) / set1(float(kVecs * kLanes)) + set1(eps)));
}

// Heads that lie `stride` elements apart.
template <class T>
struct HeadRow {
    const T* x;
    int64_t stride, num;
    const T* norm_weight;  // or null
    float eps;
};

// norm_row (unless there is no weight) and rotate, operation by operation, of whole heads that stay in registers.
template <class T, int kVecs, class Angles>
void turn_heads(T* to, int64_t to_stride, const HeadRow<T>& heads, const Angles& angles_of) {
    constexpr int kHalf = kVecs / 2;
    const T *x = heads.x, *weight = heads.norm_weight;
    alignas(64) float scales[kLanes] = {};
    for (int64_t head = 0; head < heads.num; ++head, x += heads.stride, to += to_stride) {
        if (weight != nullptr && head % kLanes == 0) {
            const int64_t left = heads.num - head;
            scales_of<T, kVecs>(scales, x, heads.stride, left < kLanes ? left : kLanes, heads.eps);
        }
        Vec v[kVecs];
        for (int i = 0; i < kVecs; ++i) v[i] = load(x + i * kLanes);
        if (weight != nullptr) {
            const Vec scale = set1(scales[head % kLanes]);
            for (int i = 0; i < kVecs; ++i)
                v[i] = stored<T>(stored<T>(v[i] * scale) * load(weight + i * kLanes));
        }
        const float* cos_sin = angles_of(head);
        for (int i = 0; i < kHalf; ++i) {
            const Vec c = load(cos_sin + i * kLanes), s = load(cos_sin + (kHalf + i) * kLanes);
            put(to + i * kLanes, v[i] * c - v[kHalf + i] * s);
            put(to + (kHalf + i) * kLanes, v[kHalf + i] * c + v[i] * s);
        }
    }
}

// Heads, to `to` and as far apart as to_stride says, in elements: the heads themselves, or other memory.
// angles_of(i): the i-th one's cosines, then its sines, of each of the `half` pairs of dimensions that turn.
template <class T, class Angles>
void rotate_row(T* to, int64_t to_stride, const HeadRow<T>& heads, int64_t head_dim, int64_t half,
                const Angles& angles_of) {
    if (head_dim == 2 * half && head_dim == 8 * kLanes) return turn_heads<T, 8>(to, to_stride, heads, angles_of);
    if (head_dim == 2 * half && head_dim == 4 * kLanes) return turn_heads<T, 4>(to, to_stride, heads, angles_of);
    const T* x = heads.x;
    for (int64_t head = 0; head < heads.num; ++head, x += heads.stride, to += to_stride) {
        if (heads.norm_weight != nullptr) norm_row(to, x, heads.norm_weight, head_dim, heads.eps);
        else if (to != x) std::memcpy(to, x, size_t(head_dim) * sizeof(T));
        const float* cos_sin = angles_of(head);
        rotate(to, to + half, cos_sin, cos_sin + half, half);
    }
}

// All heads of a token.
template <class T>
void rotate_heads(T* to, int64_t to_stride, const Heads& heads, int64_t head_dim, float eps, int64_t token,
                  const float* cos_sin, int64_t half) {
    const HeadRow<T> row{static_cast<const T*>(heads.x) + token * heads.token_stride, heads.head_stride,
                         heads.num_heads, static_cast<const T*>(heads.norm_weight), eps};
    rotate_row(to, to_stride, row, head_dim, half, [cos_sin](int64_t) { return cos_sin; });
}

template <class T>
void rotate_in_place(const Heads& heads, int64_t head_dim, float eps, int64_t token, const float* cos_sin, int64_t half) {
    rotate_heads(static_cast<T*>(heads.x) + token * heads.token_stride, heads.head_stride, heads, head_dim, eps, token,
                 cos_sin, half);
}

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
