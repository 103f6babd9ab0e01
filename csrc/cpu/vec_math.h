// What attention, sampling and soft caps need of a vector beyond isa.h: masks, a transpose, logarithm, tanh, 32-bit integers.
// The rules of isa.h hold here too.
#pragma once

#include "isa.h"

namespace minivllm::MINIVLLM_ISA {

constexpr float kInfinity = __builtin_inff();

// ---- masks: bit i of the answer is lane i's ----

#if defined(__AVX512F__)
MINIVLLM_INLINE uint32_t lanes_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
MINIVLLM_INLINE uint32_t lanes_at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
MINIVLLM_INLINE uint32_t lanes_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
// True for NaNs.
MINIVLLM_INLINE uint32_t lanes_not_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ); }
#else
MINIVLLM_INLINE uint32_t lanes_equal(Vec a, Vec b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}
MINIVLLM_INLINE uint32_t lanes_at_least(Vec a, Vec b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}
MINIVLLM_INLINE uint32_t lanes_less(Vec a, Vec b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)));
}
MINIVLLM_INLINE uint32_t lanes_not_less(Vec a, Vec b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)));
}
#endif
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

// 0, 1, 2, … as floats.
MINIVLLM_INLINE Vec lane_numbers() {
    static constexpr float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(numbers);
}

// The first n lanes of p, and `rest` in the others; reads nothing beyond p[n - 1].
MINIVLLM_INLINE Vec load_first(const float* p, int n, float rest) {
    return where_less(lane_numbers(), set1(float(n)), load_partial(p, n), set1(rest));
}

// ---- transpose of kLanes vectors, in place ----

#if defined(__AVX512F__)
MINIVLLM_INLINE void transpose(Vec (&r)[16]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 4) {  // 4×4 blocks within each 128-bit lane
        const __m512 a = _mm512_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
        const __m512 c = _mm512_unpacklo_ps(r[i + 2].v, r[i + 3].v), d = _mm512_unpackhi_ps(r[i + 2].v, r[i + 3].v);
        t[i] = _mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {  // then the 4×4 of lanes
        const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
        const __m512 c = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
        r[i].v = _mm512_shuffle_f32x4(a, b, 0x88);
        r[i + 4].v = _mm512_shuffle_f32x4(c, d, 0x88);
        r[i + 8].v = _mm512_shuffle_f32x4(a, b, 0xdd);
        r[i + 12].v = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
}
#else
MINIVLLM_INLINE void transpose(Vec (&r)[8]) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 4) {
        const __m256 a = _mm256_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
        const __m256 c = _mm256_unpacklo_ps(r[i + 2].v, r[i + 3].v), d = _mm256_unpackhi_ps(r[i + 2].v, r[i + 3].v);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        r[i].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        r[i + 4].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}
#endif

// ---- 32-bit unsigned lanes ----

#if defined(__AVX512F__)
struct UVec { __m512i v; };
MINIVLLM_INLINE UVec uset1(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
MINIVLLM_INLINE UVec uload(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
MINIVLLM_INLINE UVec operator+(UVec a, UVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
MINIVLLM_INLINE UVec operator-(UVec a, UVec b) { return {_mm512_sub_epi32(a.v, b.v)}; }
MINIVLLM_INLINE UVec operator^(UVec a, UVec b) { return {_mm512_xor_si512(a.v, b.v)}; }
MINIVLLM_INLINE UVec operator&(UVec a, UVec b) { return {_mm512_and_si512(a.v, b.v)}; }
MINIVLLM_INLINE UVec operator|(UVec a, UVec b) { return {_mm512_or_si512(a.v, b.v)}; }
MINIVLLM_INLINE UVec to_integers(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
MINIVLLM_INLINE void store_bytes(uint8_t* p, UVec a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
template <int n> MINIVLLM_INLINE UVec shift_right(UVec a) { return {_mm512_srli_epi32(a.v, n)}; }
template <int n> MINIVLLM_INLINE UVec shift_right_signed(UVec a) { return {_mm512_srai_epi32(a.v, n)}; }
template <int n> MINIVLLM_INLINE UVec shift_left(UVec a) { return {_mm512_slli_epi32(a.v, n)}; }
MINIVLLM_INLINE Vec signed_to_float(UVec a) { return {_mm512_cvtepi32_ps(a.v)}; }
MINIVLLM_INLINE UVec bits_of(Vec a) { return {_mm512_castps_si512(a.v)}; }
MINIVLLM_INLINE Vec floats_of(UVec a) { return {_mm512_castsi512_ps(a.v)}; }
MINIVLLM_INLINE UVec unpack_low64(UVec a, UVec b) { return {_mm512_unpacklo_epi64(a.v, b.v)}; }
MINIVLLM_INLINE UVec unpack_high64(UVec a, UVec b) { return {_mm512_unpackhi_epi64(a.v, b.v)}; }
#else
struct UVec { __m256i v; };
MINIVLLM_INLINE UVec uset1(uint32_t x) { return {_mm256_set1_epi32(int(x))}; }
MINIVLLM_INLINE UVec uload(const uint32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
MINIVLLM_INLINE UVec operator+(UVec a, UVec b) { return {_mm256_add_epi32(a.v, b.v)}; }
MINIVLLM_INLINE UVec operator-(UVec a, UVec b) { return {_mm256_sub_epi32(a.v, b.v)}; }
MINIVLLM_INLINE UVec operator^(UVec a, UVec b) { return {_mm256_xor_si256(a.v, b.v)}; }
MINIVLLM_INLINE UVec operator&(UVec a, UVec b) { return {_mm256_and_si256(a.v, b.v)}; }
MINIVLLM_INLINE UVec operator|(UVec a, UVec b) { return {_mm256_or_si256(a.v, b.v)}; }
MINIVLLM_INLINE UVec to_integers(Vec a) { return {_mm256_cvtps_epi32(a.v)}; }
MINIVLLM_INLINE void store_bytes(uint8_t* p, UVec a) {  // of numbers below 256
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(halves, halves));
}
template <int n> MINIVLLM_INLINE UVec shift_right(UVec a) { return {_mm256_srli_epi32(a.v, n)}; }
template <int n> MINIVLLM_INLINE UVec shift_right_signed(UVec a) { return {_mm256_srai_epi32(a.v, n)}; }
template <int n> MINIVLLM_INLINE UVec shift_left(UVec a) { return {_mm256_slli_epi32(a.v, n)}; }
MINIVLLM_INLINE Vec signed_to_float(UVec a) { return {_mm256_cvtepi32_ps(a.v)}; }
MINIVLLM_INLINE UVec bits_of(Vec a) { return {_mm256_castps_si256(a.v)}; }
MINIVLLM_INLINE Vec floats_of(UVec a) { return {_mm256_castsi256_ps(a.v)}; }
MINIVLLM_INLINE UVec unpack_low64(UVec a, UVec b) { return {_mm256_unpacklo_epi64(a.v, b.v)}; }
MINIVLLM_INLINE UVec unpack_high64(UVec a, UVec b) { return {_mm256_unpackhi_epi64(a.v, b.v)}; }
#endif

// ln x within 2 units in the last place, for positive normal x (near 1 too: x - 1 is exact there). x = 2^n m with
// m in [√½, √2); ln m = 2 artanh s with s = (m - 1) / (m + 1), |s| < 0.1716, by its series to s^9, whose
// remainder is 4e-9 of the whole.
MINIVLLM_INLINE Vec log(Vec x) {
    const UVec bits = bits_of(x);
    const UVec n = shift_right_signed<23>(bits - uset1(0x3f3504f3));  // √½
    const Vec f = floats_of(bits - shift_left<23>(n)) - set1(1.0f);
    const Vec s = f / (f + set1(2.0f));
    const Vec s2 = s * s;
    Vec p = set1(2.0f / 9);
    p = fma(p, s2, set1(2.0f / 7));
    p = fma(p, s2, set1(2.0f / 5));
    p = fma(p, s2, set1(2.0f / 3));
    const Vec log_m = fma(p * s2, s, s + s);
    const Vec exponent = signed_to_float(n);
    return fma(exponent, set1(0.693145752f), fma(exponent, set1(1.42860677e-6f), log_m));  // ln 2 = high + low
}

// Within 1.5e-7, not relatively: of a tanh near zero few digits are left.
MINIVLLM_INLINE Vec tanh(Vec x) { return set1(1.0f) - set1(2.0f) / (exp(x + x) + set1(1.0f)); }

}  // namespace minivllm::MINIVLLM_ISA
