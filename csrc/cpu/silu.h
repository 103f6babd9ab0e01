// SiLU(gate) * up, as the activation kernel and the linear layer's epilogue compute it. The rules of isa.h hold here.
#pragma once

#include "isa.h"

namespace minivllm::MINIVLLM_ISA {

template <class T>
MINIVLLM_INLINE Vec silu(Vec x) { return x / (set1(1.0f) + exp(zero() - x)); }

#if defined(__AMX_BF16__)
// Within 6e-6, relatively (one bfloat16 rounds otherwise than by the above), and zero below -88, by a third of the
// instructions: while tiles are multiplied, floats have one of the two ports.
template <>
MINIVLLM_INLINE Vec silu<bf16>(Vec x) {
    // 2^t by its whole part, which the sum with 1.5 × 2^23 leaves in the lowest bits, and a polynomial on ±½.
    const Vec t = {_mm512_range_ps((x * set1(-1.44269504f)).v, _mm512_set1_ps(127.0f), 2)};  // ±127 at most
    const Vec shifted = t + set1(12582912.0f), r = t - (shifted - set1(12582912.0f));
    Vec p = set1(9.58285e-3f);
    p = fma(p, r, set1(5.590642e-2f));
    p = fma(p, r, set1(2.4024099e-1f));
    p = fma(p, r, set1(6.9312419e-1f));
    p = fma(p, r, set1(1.0f));
    const __m512i whole = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
    const Vec power = {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), whole))};
    const Vec below = set1(1.0f) + power, near = {_mm512_rcp14_ps(below.v)};
    const __mmask16 is_seen = _mm512_cmp_ps_mask(t.v, _mm512_set1_ps(127.0f), _CMP_LT_OQ);  // else zero
    const Vec error = fnma(below, near, set1(1.0f));
    return x * Vec{_mm512_maskz_fmadd_ps(is_seen, near.v, error.v, near.v)};
}
#endif

// The SiLU is rounded to T before the product, as Hugging Face does.
template <class T>
MINIVLLM_INLINE Vec silu_mul(Vec gate, Vec up) { return rounded<T>(silu<T>(gate)) * up; }

}  // namespace minivllm::MINIVLLM_ISA
