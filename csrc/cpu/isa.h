// Vectors of float32 lanes: 8 with AVX2, 16 with AVX-512, one source for both.
//
// A kernel file is compiled once per instruction set with MINIVLLM_ISA = avx2, avx512, … (see dispatch.h), and puts all it
// defines into `namespace minivllm::MINIVLLM_ISA`. Two rules follow:
//   - Nothing outside that namespace may be emitted from a kernel file: no std containers, no std::function, no
//     out-of-line std template. The linker keeps ONE copy of such a function, and may keep the AVX-512 one for
//     a processor that has none.
//   - No static objects with constructors: they would run on every processor.
//
// Arithmetic is exactly what is written: one operation, one rounding; fma where it says fma. Partial loads give
// zeros beyond n, so a tail computes lane by lane what a full vector does. Conversions round to nearest even;
// those to bfloat16 make subnormals zero on AMX, whose products take them for that.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

// gcc's loads of tiles (12's, at least) do not say that they read memory, so that it may leave out the stores to what they
// load, or put them behind. These say it, of all that lies behind the address, and hold up nothing else, as a barrier would.
#if defined(__AMX_TILE__) && defined(_tile_loadd_internal)
#undef _tile_loadd_internal
#undef _tile_stream_loadd_internal
#define _tile_loadd_internal(tile, from, stride) MINIVLLM_LOAD_TILE("tileloadd", tile, from, stride)
#define _tile_stream_loadd_internal(tile, from, stride) MINIVLLM_LOAD_TILE("tileloaddt1", tile, from, stride)
#define MINIVLLM_LOAD_TILE(instruction, tile, from, stride)                                                         \
    do {                                                                                                            \
        const void* const place = (from);                                                                           \
        asm volatile(instruction "\t(%0,%1,1), %%tmm" #tile ::"r"(place), "r"((long)(stride)),                      \
                     "m"(*static_cast<const char(*)[]>(place)));                                                    \
    } while (0)
#endif

#ifndef MINIVLLM_ISA
#error "kernel files are compiled by CMake with MINIVLLM_ISA set; bindings must not include isa.h"
#endif
#define MINIVLLM_INLINE inline __attribute__((always_inline))

namespace minivllm::MINIVLLM_ISA {

#if defined(__AVX512F__)
struct Vec { __m512 v; };
constexpr int kLanes = 16;
#else
struct Vec { __m256 v; };
constexpr int kLanes = 8;
#endif

// ---- one number ----

MINIVLLM_INLINE float bits_to_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
MINIVLLM_INLINE uint32_t float_to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

MINIVLLM_INLINE float to_float(float x) { return x; }
MINIVLLM_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
MINIVLLM_INLINE float to_float(f16 x) { return _cvtsh_ss(x.bits); }

template <class T> MINIVLLM_INLINE T from_float(float x);
template <> MINIVLLM_INLINE float from_float<float>(float x) { return x; }
template <> MINIVLLM_INLINE bf16 from_float<bf16>(float x) {
    const uint32_t bits = float_to_bits(x);
    if (x != x) return {uint16_t((bits >> 16) | 0x40)};  // rounding could carry a NaN over into infinity
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <> MINIVLLM_INLINE f16 from_float<f16>(float x) {
    return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

// ---- vectors ----

#if defined(__AVX512F__)

MINIVLLM_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
MINIVLLM_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
MINIVLLM_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
MINIVLLM_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
MINIVLLM_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
MINIVLLM_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
MINIVLLM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a*b + c
MINIVLLM_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a*b
MINIVLLM_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
MINIVLLM_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where either is NaN

MINIVLLM_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }

MINIVLLM_INLINE Vec widen_bf16(__m256i h) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
#if defined(__AMX_BF16__)
MINIVLLM_INLINE __m256i narrow_bf16(Vec a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }  // subnormals become zero
#else
MINIVLLM_INLINE __m256i narrow_bf16(Vec a) {
    const __m512i x = _mm512_castps_si512(a.v);
    const __m512i high = _mm512_srli_epi32(x, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(x, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}
#endif
MINIVLLM_INLINE Vec widen_f16(__m256i h) { return {_mm512_cvtph_ps(h)}; }
MINIVLLM_INLINE __m256i narrow_f16(Vec a) {
    return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

MINIVLLM_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
MINIVLLM_INLINE Vec load(const bf16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
MINIVLLM_INLINE Vec load(const f16* p) { return widen_f16(_mm256_loadu_si256((const __m256i*)p)); }
MINIVLLM_INLINE Vec load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
MINIVLLM_INLINE Vec load_partial(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
MINIVLLM_INLINE Vec load_partial(const f16* p, int n) { return widen_f16(_mm256_maskz_loadu_epi16(first(n), p)); }
MINIVLLM_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
MINIVLLM_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(a)); }
MINIVLLM_INLINE void store(f16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow_f16(a)); }
MINIVLLM_INLINE void store_partial(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
MINIVLLM_INLINE void store_partial(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a)); }
MINIVLLM_INLINE void store_partial(f16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(a)); }

// Lanes are folded in halves: i with i+8, then i+4, i+2, i+1.
MINIVLLM_INLINE __m256 upper(Vec a) { return _mm512_extractf32x8_ps(a.v, 1); }
MINIVLLM_INLINE __m256 fold_add(Vec a) { return _mm256_add_ps(_mm512_castps512_ps256(a.v), upper(a)); }
MINIVLLM_INLINE __m256 fold_max(Vec a) { return _mm256_max_ps(_mm512_castps512_ps256(a.v), upper(a)); }

// a where x < y, else b.
MINIVLLM_INLINE Vec where_less(Vec x, Vec y, Vec a, Vec b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
MINIVLLM_INLINE Vec round_even(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n for whole n in [-126, 127].
MINIVLLM_INLINE Vec power_of_two(Vec n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}

#else  // AVX2

MINIVLLM_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
MINIVLLM_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
MINIVLLM_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
MINIVLLM_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
MINIVLLM_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
MINIVLLM_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
MINIVLLM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }    // a*b + c
MINIVLLM_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a*b
MINIVLLM_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where either is NaN
MINIVLLM_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }  // b where either is NaN

MINIVLLM_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

MINIVLLM_INLINE Vec widen_bf16(__m128i h) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
MINIVLLM_INLINE __m128i narrow_bf16(Vec a) {
    const __m256i x = _mm256_castps_si256(a.v);
    const __m256i high = _mm256_srli_epi32(x, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(x, bias), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i w = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}
MINIVLLM_INLINE Vec widen_f16(__m128i h) { return {_mm256_cvtph_ps(h)}; }
MINIVLLM_INLINE __m128i narrow_f16(Vec a) {
    return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MINIVLLM_INLINE __m128i load_halves(const void* p, int n) {
    alignas(16) uint16_t lanes[8] = {};
    for (int i = 0; i < n; ++i) lanes[i] = static_cast<const uint16_t*>(p)[i];
    return _mm_load_si128((const __m128i*)lanes);
}
MINIVLLM_INLINE void store_halves(void* p, __m128i h, int n) {
    alignas(16) uint16_t lanes[8];
    _mm_store_si128((__m128i*)lanes, h);
    for (int i = 0; i < n; ++i) static_cast<uint16_t*>(p)[i] = lanes[i];
}

MINIVLLM_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
MINIVLLM_INLINE Vec load(const bf16* p) { return widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
MINIVLLM_INLINE Vec load(const f16* p) { return widen_f16(_mm_loadu_si128((const __m128i*)p)); }
MINIVLLM_INLINE Vec load_partial(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
MINIVLLM_INLINE Vec load_partial(const bf16* p, int n) { return widen_bf16(load_halves(p, n)); }
MINIVLLM_INLINE Vec load_partial(const f16* p, int n) { return widen_f16(load_halves(p, n)); }
MINIVLLM_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
MINIVLLM_INLINE void store(bf16* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow_bf16(a)); }
MINIVLLM_INLINE void store(f16* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow_f16(a)); }
MINIVLLM_INLINE void store_partial(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
MINIVLLM_INLINE void store_partial(bf16* p, Vec a, int n) { store_halves(p, narrow_bf16(a), n); }
MINIVLLM_INLINE void store_partial(f16* p, Vec a, int n) { store_halves(p, narrow_f16(a), n); }

// Lanes are folded in halves: i with i+4, then i+2, i+1.
MINIVLLM_INLINE __m256 fold_add(Vec a) { return a.v; }
MINIVLLM_INLINE __m256 fold_max(Vec a) { return a.v; }

// a where x < y, else b.
MINIVLLM_INLINE Vec where_less(Vec x, Vec y, Vec a, Vec b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
}
MINIVLLM_INLINE Vec round_even(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n for whole n in [-126, 127].
MINIVLLM_INLINE Vec power_of_two(Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}

#endif

// ---- shared by both widths ----

// Loads a word of each line of a KiB that tile loads will read next: the processor's own fetching follows loads best, and
// tile loads read at 85 to 90 % of that rate alone or beside prefetches. All of it must be there to be read.
MINIVLLM_INLINE void touch_kib(const void* kib) {
    for (int line = 0; line < 16; ++line) {
        int word;
        asm volatile("movl %1, %0" : "=r"(word) : "m"(static_cast<const int*>(kib)[16 * line]));
    }
}

// x rounded to T and back: what the value is once stored.
template <class T>
MINIVLLM_INLINE Vec rounded(Vec x) {
    if constexpr (std::is_same_v<T, bf16>) return widen_bf16(narrow_bf16(x));
    else if constexpr (std::is_same_v<T, f16>) return widen_f16(narrow_f16(x));
    else return x;
}

MINIVLLM_INLINE float reduce_add(Vec a) {
    const __m256 y = fold_add(a);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

MINIVLLM_INLINE float reduce_max(Vec a) {
    const __m256 y = fold_max(a);
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// e^x within 1 unit in the last place (0.902 measured) for x in [-87.33, 88.72]; 0 below (-inf included),
// infinity above, NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series to r^7, whose
// remainder is 5e-9.
MINIVLLM_INLINE Vec exp(Vec x) {
    const Vec lowest = set1(-87.33f), highest = set1(88.7228f);
    const Vec clamped = max(lowest, min(highest, x));  // NaN stays: min and max return their second operand
    const Vec n = round_even(clamped * set1(1.44269504f));
    const Vec r = fnma(n, set1(1.42860677e-6f), fnma(n, set1(0.693145752f), clamped));  // ln 2 = high + low
    Vec p = set1(1.0f / 5040);
    p = fma(p, r, set1(1.0f / 720));
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    const Vec half = round_even(n * set1(0.5f));  // 2^128 is no float32: scale in two steps
    const Vec y = p * power_of_two(half) * power_of_two(n - half);
    const Vec bounded = where_less(highest, x, set1(__builtin_inff()), y);
    return where_less(x, lowest, zero(), bounded);
}

}  // namespace minivllm::MINIVLLM_ISA
