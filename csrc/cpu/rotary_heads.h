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

// norm_row (unless there is no weight) and rotate, operation by operation, of whole heads that stay in registers.
template <class T, int kVecs>
void turn_heads(T* to, int64_t to_stride, const Heads& heads, float eps, int64_t token, const float* cos_sin) {
    constexpr int kHalf = kVecs / 2;
    const T* x = static_cast<const T*>(heads.x) + token * heads.token_stride;
    const T* weight = static_cast<const T*>(heads.norm_weight);
    alignas(64) float scales[kLanes] = {};
    for (int64_t head = 0; head < heads.num_heads; ++head, x += heads.head_stride, to += to_stride) {
        if (weight != nullptr && head % kLanes == 0) {
            const int64_t left = heads.num_heads - head;
            scales_of<T, kVecs>(scales, x, heads.head_stride, left < kLanes ? left : kLanes, eps);
        }
        Vec v[kVecs];
        for (int i = 0; i < kVecs; ++i) v[i] = load(x + i * kLanes);
        if (weight != nullptr) {
            const Vec scale = set1(scales[head % kLanes]);
            for (int i = 0; i < kVecs; ++i)
                v[i] = stored<T>(stored<T>(v[i] * scale) * load(weight + i * kLanes));
        }
        for (int i = 0; i < kHalf; ++i) {
            const Vec c = load(cos_sin + i * kLanes), s = load(cos_sin + (kHalf + i) * kLanes);
            put(to + i * kLanes, v[i] * c - v[kHalf + i] * s);
            put(to + (kHalf + i) * kLanes, v[kHalf + i] * c + v[i] * s);
        }
    }
}

// A token's heads, to `to` and as far apart as to_stride says, in elements: the heads themselves, or other memory.
// half: of the dimensions that turn, of which cos_sin has the cosines, then the sines.
template <class T>
void rotate_heads(T* to, int64_t to_stride, const Heads& heads, int64_t head_dim, float eps, int64_t token,
                  const float* cos_sin, int64_t half) {
    if (head_dim == 2 * half && head_dim == 8 * kLanes)
        return turn_heads<T, 8>(to, to_stride, heads, eps, token, cos_sin);
    if (head_dim == 2 * half && head_dim == 4 * kLanes)
        return turn_heads<T, 4>(to, to_stride, heads, eps, token, cos_sin);
    const T* x = static_cast<const T*>(heads.x) + token * heads.token_stride;
    for (int64_t head = 0; head < heads.num_heads; ++head, x += heads.head_stride, to += to_stride) {
        if (heads.norm_weight != nullptr) norm_row(to, x, static_cast<const T*>(heads.norm_weight), head_dim, eps);
        else if (to != x) std::memcpy(to, x, size_t(head_dim) * sizeof(T));
        rotate(to, to + half, cos_sin, cos_sin + half, half);
    }
}

template <class T>
void rotate_in_place(const Heads& heads, int64_t head_dim, float eps, int64_t token, const float* cos_sin, int64_t half) {
    rotate_heads(static_cast<T*>(heads.x) + token * heads.token_stride, heads.head_stride, heads, head_dim, eps, token,
                 cos_sin, half);
}

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
