// Integer vectors for the int8 kernels: from floats and back, and products of 16-bit pairs. The rules of isa.h hold.
#pragma once

#include "isa.h"

namespace minivllm::MINIVLLM_ISA {

#if defined(__AVX512F__)

// Bit i of the answer: a < b in lane i.
MINIVLLM_INLINE uint32_t less_mask(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }

// To the nearest whole number, ties to even; kLanes of them.
MINIVLLM_INLINE void store_integers(int8_t* p, Vec x) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
MINIVLLM_INLINE void store_integers(int16_t* p, Vec x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)));
}
MINIVLLM_INLINE __m512i rounded_product(const bf16* p, Vec factor) { return _mm512_cvtps_epi32((load(p) * factor).v); }
// 64 of them, each the product of x and the factor, which is in ±127.
MINIVLLM_INLINE void store_64_products(int8_t* p, const bf16* x, Vec factor) {
    const __m512i a = _mm512_packs_epi32(rounded_product(x, factor), rounded_product(x + 16, factor));
    const __m512i b = _mm512_packs_epi32(rounded_product(x + 32, factor), rounded_product(x + 48, factor));
    const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(fours, _mm512_packs_epi16(a, b)));
}
// The largest magnitude of n numbers; infinite, or no number, if one of them is: without its sign, a bfloat16's bits have
// the order of what they stand for.
MINIVLLM_INLINE float largest_magnitude(const bf16* x, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i most = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    const __m512i rest = _mm512_maskz_loadu_epi16((1u << (n - i)) - 1, x + i);
    most = _mm512_max_epu16(most, _mm512_and_si512(rest, magnitude));
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    return to_float(bf16{uint16_t(_mm512_reduce_max_epu32(_mm512_cvtepu16_epi32(half)))});
}
MINIVLLM_INLINE Vec load_integers(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }

// The sums of pairs: for 16 features of four k each, two of a feature side by side.
struct Quads { __m512i low, high; };
struct PairSums { __m512i low, high; };
MINIVLLM_INLINE PairSums no_pairs() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
MINIVLLM_INLINE Quads widen_quads(const int8_t* p) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)),
            _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(p + 32)))};
}
MINIVLLM_INLINE void add_pairs(PairSums& sums, const Quads& w, const int16_t* x) {
    int64_t four;
    std::memcpy(&four, x, 8);
    const __m512i q = _mm512_set1_epi64(four);
    sums.low = _mm512_add_epi32(sums.low, _mm512_madd_epi16(w.low, q));
    sums.high = _mm512_add_epi32(sums.high, _mm512_madd_epi16(w.high, q));
}

// The multipliers of kLanes features, up to 16, and what they make of codes of 4 bits with 8 added: in a byte, code ×
// multiplier. Two bytes are multiplied at once, as 15 × 16 fits one.
struct Multipliers {
    __m512i pairs, eights;
    MINIVLLM_INLINE explicit Multipliers(const uint8_t* p) {
        const __m512i one = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        pairs = _mm512_or_si512(one, _mm512_slli_epi32(one, 16));
        eights = _mm512_or_si512(_mm512_slli_epi16(pairs, 3), _mm512_slli_epi16(pairs, 11));
    }
    MINIVLLM_INLINE void unpack(int8_t* low, int8_t* high, const uint8_t* codes) const {
        const __m512i both = _mm512_loadu_si512(codes), mask = _mm512_set1_epi8(15);
        const __m512i a = _mm512_and_si512(both, mask), b = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        _mm512_storeu_si512(low, _mm512_sub_epi8(_mm512_mullo_epi16(a, pairs), eights));
        _mm512_storeu_si512(high, _mm512_sub_epi8(_mm512_mullo_epi16(b, pairs), eights));
    }
};

#else

MINIVLLM_INLINE uint32_t less_mask(Vec a, Vec b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)));
}
MINIVLLM_INLINE void store_integers(int16_t* p, Vec x) {
    const __m256i whole = _mm256_cvtps_epi32(x.v);
    const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storeu_si128((__m128i*)p, narrow);
}
MINIVLLM_INLINE void store_integers(int8_t* p, Vec x) {
    const __m256i whole = _mm256_cvtps_epi32(x.v);
    const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(narrow, narrow));
}
MINIVLLM_INLINE Vec load_integers(const int32_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)p))};
}

struct Quads { __m256i low, high; };
struct PairSums { __m256i low, high; };
MINIVLLM_INLINE PairSums no_pairs() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
MINIVLLM_INLINE Quads widen_quads(const int8_t* p) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
MINIVLLM_INLINE void add_pairs(PairSums& sums, const Quads& w, const int16_t* x) {
    int64_t four;
    std::memcpy(&four, x, 8);
    const __m256i q = _mm256_set1_epi64x(four);
    sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(w.low, q));
    sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(w.high, q));
}

struct Multipliers {
    __m256i pairs, eights;
    MINIVLLM_INLINE explicit Multipliers(const uint8_t* p) {
        const __m256i one = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
        pairs = _mm256_or_si256(one, _mm256_slli_epi32(one, 16));
        eights = _mm256_or_si256(_mm256_slli_epi16(pairs, 3), _mm256_slli_epi16(pairs, 11));
    }
    MINIVLLM_INLINE void unpack(int8_t* low, int8_t* high, const uint8_t* codes) const {
        const __m256i both = _mm256_loadu_si256((const __m256i*)codes), mask = _mm256_set1_epi8(15);
        const __m256i a = _mm256_and_si256(both, mask), b = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        _mm256_storeu_si256((__m256i*)low, _mm256_sub_epi8(_mm256_mullo_epi16(a, pairs), eights));
        _mm256_storeu_si256((__m256i*)high, _mm256_sub_epi8(_mm256_mullo_epi16(b, pairs), eights));
    }
};

#endif

// As floats.
MINIVLLM_INLINE void store_integers(float* p, Vec x) { store(p, round_even(x)); }

// The kLanes whole sums, in the order of the features.
MINIVLLM_INLINE void fold_pairs(int32_t* to, const PairSums& sums) {
    int32_t pairs[2 * kLanes];
    std::memcpy(pairs, &sums, sizeof pairs);
    for (int i = 0; i < kLanes; ++i) to[i] = pairs[2 * i] + pairs[2 * i + 1];
}

}  // namespace minivllm::MINIVLLM_ISA
