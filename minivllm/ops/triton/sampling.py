"""Choosing tokens on the device: the noise of `ops/sampling.py` to the bit of its random words, and the truncations.

A row is one row's work and nobody else's, so its token does not depend on the batch. No result goes to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.ops.checks import require
from minivllm.ops.sampling import SAMPLE, _log_ratio
from minivllm.ops.triton.numerics import log, philox

_CHUNK = 4096  # of the vocabulary; a program's
_TILE = 4096  # of a row that one program goes through again and again
_DIGIT_BITS = 4  # of a radix search; 32 is a multiple


# Gumbel-max ------------------------------------------------------------------


@triton.jit
def _noise(seed, position, first, PURPOSE: tl.constexpr, CHUNK: tl.constexpr):
    """Gumbel noise of the vocabulary indices first … first + CHUNK (first a multiple of 4)."""
    blocks = (first // 4 + tl.arange(0, CHUNK // 4)).to(tl.uint32)
    zero = tl.zeros_like(blocks)
    c0, c1, c2, c3 = philox(
        blocks, zero + position.to(tl.uint32), zero + (position >> 32).to(tl.uint32), zero + PURPOSE,
        zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32),
    )  # fmt: skip
    words = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    u = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return 0.0 - log(0.0 - log(u))


@triton.jit
def _peak_kernel(
    best, best_index, is_broken, logits, temperature, seeds, positions, row_stride, vocab_size, num_chunks,
    PURPOSE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The best of each chunk of each row, the lowest index on ties. Grid: (num_rows, num_chunks)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    is_token = index < vocab_size
    # Read once, and of no use to anyone after this.
    x = tl.load(
        logits + row * row_stride + index, mask=is_token, other=float("-inf"), eviction_policy="evict_first"
    )
    broken = tl.max(tl.where((x != x) | (x == float("inf")), 1, 0), 0)
    t = tl.load(temperature + row)
    if t > 0.0:
        noise = _noise(tl.load(seeds + row), tl.load(positions + row), chunk * CHUNK, PURPOSE, CHUNK)
        x = tl.div_rn(x, tl.zeros_like(x) + t) + noise
    most = tl.max(x, 0)
    place = row * num_chunks + chunk
    tl.store(best + place, most)
    tl.store(best_index + place, tl.min(tl.where((x == most) & is_token, index, vocab_size - 1), 0))
    tl.store(is_broken + place, broken)


@triton.jit
def _choose_kernel(tokens, is_row_broken, best, best_index, is_broken, num_chunks, BLOCK: tl.constexpr):
    """The best chunk's token; in a row of NaN the first, for the next step looks it up before the host knows. Grid:
    (num_rows,)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    places = row * num_chunks + chunk
    x = tl.load(best + places, mask=chunk < num_chunks, other=float("-inf"))
    index = tl.load(best_index + places, mask=chunk < num_chunks, other=2147483647)
    broken = tl.max(tl.load(is_broken + places, mask=chunk < num_chunks, other=0), 0)
    most = tl.max(x, 0)
    token = tl.min(tl.where(x == most, index, 2147483647), 0)
    tl.store(tokens + row, tl.where(token == 2147483647, 0, token).to(tl.int64))
    tl.store(is_row_broken + row, tl.where(most == float("-inf"), 1, broken).to(tl.uint8))


def gumbel_argmax(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gumbel_argmax_reference` of `ops/sampling.py`, its noise by the CPU kernels' arithmetic. Any row stride."""
    num_rows, vocab_size = logits.shape
    require("logits", logits, torch.float32, logits.shape, dense=1)
    require("temperature", temperature, torch.float32, (num_rows,))
    require("seeds", seeds, torch.int64, (num_rows,))
    require("positions", positions, torch.int64, (num_rows,))
    device = logits.device
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    broken = torch.empty(num_rows, dtype=torch.uint8, device=device)
    if not num_rows:
        return tokens, broken
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    best = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=device)
    best_index, is_broken = torch.empty(2, num_rows, num_chunks, dtype=torch.int32, device=device)
    _peak_kernel[(num_rows, num_chunks)](
        best, best_index, is_broken, logits, temperature, seeds, positions, logits.stride(0), vocab_size, num_chunks,
        PURPOSE=SAMPLE, CHUNK=_CHUNK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _choose_kernel[(num_rows,)](
        tokens,
        broken,
        best,
        best_index,
        is_broken,
        num_chunks,
        BLOCK=triton.next_power_of_2(num_chunks),
        num_warps=1,
    )
    return tokens, broken


# Truncation ------------------------------------------------------------------


@triton.jit
def _key(x):
    """uint32 in the order of float32; -0.0 is 0.0's equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@triton.jit
def _number(key):
    """The float32 of a key."""
    return tl.where(key >= 0x80000000, key ^ 0x80000000, ~key).to(tl.float32, bitcast=True)


@triton.jit
def _find(
    row,
    vocab_size,
    least,
    most,
    needed,
    BY_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
):
    """The largest value such that it and those above, none below `least`, come to `needed`, and what is then missing.

    They are counted, or weigh exp(x - most). A radix search from the highest digit: each pass over the row adds up what
    lies under each value of the next digit, a tile in float32 and the tiles in float64, so counts are exact.
    """
    bins = tl.arange(0, 1 << DIGIT_BITS)
    prefix, known = tl.full([1], 0, tl.uint32), tl.full([1], 0, tl.uint32)  # digits found, and a mask of them
    shift = tl.full([1], 32, tl.uint32)
    for _ in range(32 // DIGIT_BITS):
        shift -= DIGIT_BITS
        sums = tl.zeros([1 << DIGIT_BITS], tl.float64)
        for start in range(0, vocab_size, TILE):
            index = start + tl.arange(0, TILE)
            x = tl.load(
                row + index, mask=index < vocab_size, other=float("-inf"), eviction_policy="evict_last"
            )
            key = _key(x)
            is_counted = (index < vocab_size) & (x >= least) & ((key & known) == prefix)
            digit = ((key >> shift) & ((1 << DIGIT_BITS) - 1)).to(tl.int32)
            weight = tl.where(is_counted, 1.0, 0.0)
            if BY_WEIGHT:
                weight = tl.where(is_counted, tl.exp(x - most), 0.0)
            is_bin = digit[None, :] == bins[:, None]
            sums += tl.sum(tl.where(is_bin, weight[None, :], 0.0), 1).to(tl.float64)
        is_at_least = bins[None, :] >= bins[:, None]
        reached = tl.sum(tl.where(is_at_least, sums[None, :], 0.0), 1)
        # The highest digit that is enough; where rounding leaves none, the lowest that there is.
        is_enough = (reached >= needed) & (sums > 0.0)
        chosen = tl.max(tl.where(is_enough, bins, -1), 0)
        lowest = tl.min(tl.where(sums > 0.0, bins, (1 << DIGIT_BITS) - 1), 0)
        chosen = tl.where(chosen < 0, lowest, chosen)
        needed -= tl.sum(tl.where(bins == chosen, reached - sums, 0.0), 0)
        prefix = prefix | (chosen.to(tl.uint32) << shift)
        known = known | (tl.full([1], (1 << DIGIT_BITS) - 1, tl.uint32) << shift)
    return tl.max(_number(prefix), 0), needed


@triton.jit
def _truncate_kernel(
    logits, top_k, top_p, log_ratio, row_stride, vocab_size, TILE: tl.constexpr, DIGIT_BITS: tl.constexpr
):
    """Grid: (num_rows,)."""
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * row_stride
    k, p, ratio = tl.load(top_k + at), tl.load(top_p + at), tl.load(log_ratio + at)
    cuts_k = (k > 0) & (k < vocab_size)
    if (not cuts_k) & (p >= 1.0) & (ratio == float("-inf")):
        return
    most = tl.full([1], float("-inf"), tl.float32)
    broken = tl.full([1], 0, tl.int32)
    for start in range(0, vocab_size, TILE):
        index = start + tl.arange(0, TILE)
        x = tl.load(row + index, mask=index < vocab_size, other=float("-inf"), eviction_policy="evict_last")
        most = tl.maximum(most, tl.max(x, 0))
        broken = tl.maximum(broken, tl.max(tl.where((x != x) | (x == float("inf")), 1, 0), 0))
    if (tl.max(broken, 0) > 0) | (tl.max(most, 0) == float("-inf")):
        return
    most = tl.max(most, 0)
    least = most + ratio
    if cuts_k:
        kth, _ = _find(row, vocab_size, float("-inf"), most, k.to(tl.float64), False, TILE, DIGIT_BITS)
        least = tl.maximum(least, kth)
    num_ties = vocab_size  # kept of those that are exactly `least`
    if p < 1.0:
        mass = tl.zeros([1], tl.float64)
        for start in range(0, vocab_size, TILE):
            index = start + tl.arange(0, TILE)
            x = tl.load(
                row + index, mask=index < vocab_size, other=float("-inf"), eviction_policy="evict_last"
            )
            is_left = (index < vocab_size) & (x >= least)
            mass += tl.sum(tl.where(is_left, tl.exp(x - most), 0.0), 0).to(tl.float64)
        target = p.to(tl.float64) * tl.sum(mass, 0)
        least, missing = _find(row, vocab_size, least, most, target, True, TILE, DIGIT_BITS)
        # One tie is kept after another until the target is reached: j of them for j * weight < missing.
        each = tl.maximum(tl.exp(least - most), 1e-38).to(tl.float64)
        num_ties = tl.maximum(tl.minimum(tl.ceil(missing / each), 2147483647.0), 1.0).to(tl.int32)
    num_seen = 0
    for start in range(0, vocab_size, TILE):
        index = start + tl.arange(0, TILE)
        x = tl.load(row + index, mask=index < vocab_size, other=float("-inf"))
        is_tie = ((x == least) & (index < vocab_size)).to(tl.int32)
        place = num_seen + tl.cumsum(is_tie, 0)
        is_dropped = (x < least) | ((is_tie > 0) & (place > num_ties))
        tl.store(
            row + index, tl.full([TILE], float("-inf"), tl.float32), mask=is_dropped & (index < vocab_size)
        )
        num_seen += tl.sum(is_tie, 0)


def top_k_top_p_min_p(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """`top_k_top_p_min_p_reference` of `ops/sampling.py`, by selection instead of a sort. Any row stride.

    Keeps the same set, unless the cumulated probability lies within about 1e-7 of p. Rows that ask for nothing cost
    nothing.
    """
    num_rows, vocab_size = logits.shape
    log_ratio = _log_ratio(min_p)
    require("logits", logits, torch.float32, logits.shape, dense=1)
    require("top_k", top_k, torch.int32, (num_rows,))
    require("top_p", top_p, torch.float32, (num_rows,))
    require("min_p", log_ratio, torch.float32, (num_rows,))
    if num_rows:
        _truncate_kernel[(num_rows,)](
            logits, top_k, top_p, log_ratio, logits.stride(0), vocab_size,
            TILE=_TILE, DIGIT_BITS=_DIGIT_BITS, num_warps=16,
        )  # fmt: skip
