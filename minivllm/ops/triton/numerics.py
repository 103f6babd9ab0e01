"""Arithmetic that kernels share and must not leave to a compiler's idea of it: rounding, logarithm, random words."""

from __future__ import annotations

import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: at this size the next float32 is 1 away


@triton.jit
def round_half_even(x):
    """The nearest whole number, for |x| < 2^22."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def log(x):
    """ln x within 2 units in the last place, for positive normal x: the algorithm of csrc/cpu/vec_math.h.

    tl.log is fast, but near 1 it has few digits left, and there lies the noise that wins. Compiled without fused
    multiply-adds beyond those written, this gives the CPU's bits.
    """
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23
    f = (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0
    s = tl.div_rn(f, f + 2.0)
    s2 = s * s
    p = tl.fma(tl.full(s.shape, 2.0 / 9, tl.float32), s2, tl.full(s.shape, 2.0 / 7, tl.float32))
    p = tl.fma(p, s2, tl.full(s.shape, 2.0 / 5, tl.float32))
    p = tl.fma(p, s2, tl.full(s.shape, 2.0 / 3, tl.float32))
    log_m = tl.fma(p * s2, s, s + s)
    exponent = n.to(tl.float32)
    low = tl.fma(exponent, tl.full(s.shape, 1.42860677e-6, tl.float32), log_m)
    return tl.fma(exponent, tl.full(s.shape, 0.693145752, tl.float32), low)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 as in `ops/sampling.py`: four words of 32 bits, all uint32 tensors of one shape."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3
