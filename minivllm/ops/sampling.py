"""Choosing the next token from processed logits. Owns the noise and the truncation of the distribution.

The noise is counter-based: a pure function of (seed, purpose, absolute position, vocabulary index),
so a request's tokens do not depend on its neighbours, on preemption or on a restart. Nothing here
holds a generator's state. Penalties, biases and grammar masks come before, elsewhere.
"""

from __future__ import annotations

import torch

from minivllm.ops import cuda, gpu, native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op

SAMPLE = 0  # the counter's last word says what the noise is for; 0: the token at a position

_MASK32 = 0xFFFFFFFF
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


# Gumbel-max sampling ---------------------------------------------------------


def gumbel_argmax_reference(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token a row, drawn from softmax(logits / temperature) as argmax of perturbed logits.

    logits: [num_rows, vocab_size] float32, -inf where masked; temperature: [num_rows] float32, 0 for the plain
    argmax; seeds: [num_rows] int64, the bits of an unsigned seed; positions: [num_rows] int64, the absolute
    position of the token drawn. Returns [num_rows] int64, and [num_rows] uint8: 1 for a row of
    `nonfinite_rows`, whose token means nothing. Ties go to the lowest index. The Gumbel-max trick: Maddison et
    al. 2014, arXiv:1411.0030.
    """
    sampled = temperature > 0
    scaled = logits / torch.where(sampled, temperature, 1.0).unsqueeze(1)
    noise = gumbel_noise(seeds, positions, logits.shape[1])
    perturbed = torch.where(sampled.unsqueeze(1), scaled + noise, logits)
    return _first_largest(perturbed), broken_rows(logits).to(torch.uint8)


def likeliest_reference(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`gumbel_argmax_reference` where every temperature is 0."""
    return _first_largest(logits), broken_rows(logits).to(torch.uint8)


def _first_largest(logits: torch.Tensor) -> torch.Tensor:
    """Of each row, the lowest index. Not torch's argmax, which promises no order among ties."""
    return (logits == logits.amax(dim=-1, keepdim=True)).to(torch.uint8).argmax(dim=-1)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise of each (seed, position) over the vocabulary, [num_rows, vocab_size] float32.

    u = ((word >> 9) + 0.5) * 2**-23 is exact in float32 and never 0 or 1, so the noise is finite: it
    lies in (-2.82, 16.64).
    """
    u = ((_random_words(seeds, positions, vocab_size) >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def _random_words(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The 32-bit word of each row and vocabulary index, [num_rows, vocab_size] int64.

    Word i is word i % 4 of the block whose counter is (i // 4, position's halves, purpose).
    """
    num_rows, num_blocks = len(seeds), -(-vocab_size // 4)
    shape = (num_rows, num_blocks)
    blocks = torch.arange(num_blocks, device=seeds.device).expand(shape)
    low, high = (half.unsqueeze(1).expand(shape) for half in _halves(positions))
    purpose = torch.full(shape, SAMPLE, device=seeds.device)
    key = tuple(half.unsqueeze(1) for half in _halves(seeds))
    words = torch.stack(philox4x32((blocks, low, high, purpose), key), dim=-1)
    return words.reshape(num_rows, num_blocks * 4)[:, :vocab_size]


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words from four counter and two key words.

    All int64 tensors that broadcast together, holding values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _mul_wide(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _mul_wide(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK32, (k1 + _PHILOX_KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def _mul_wide(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of the 64-bit product; int64 wraps, and its bits are the unsigned product's."""
    return _halves(a * b)[::-1]


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and high 32 bits of an int64's bit pattern."""
    return x & _MASK32, (x >> 32) & _MASK32


def gumbel_argmax_cpu(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The native `gumbel_argmax_reference`: the same random words, noise within 6e-7.

    Noise is computed only where it could still win, which changes no result. logits may have any row stride.
    """
    num_rows = logits.shape[0]
    require("logits", logits, torch.float32, logits.shape, dense=1)
    require("temperature", temperature, torch.float32, (num_rows,))
    require("seeds", seeds, torch.int64, (num_rows,))
    require("positions", positions, torch.int64, (num_rows,))
    out, broken = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.uint8)
    native.lib.gumbel_argmax(
        out.data_ptr(), broken.data_ptr(), logits.data_ptr(),
        temperature.data_ptr(), seeds.data_ptr(), positions.data_ptr(),
        logits.shape, logits.stride(0), SAMPLE,
    )  # fmt: skip
    return out, broken


# Truncation ------------------------------------------------------------------


def top_k_top_p_min_p_reference(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """Mask to -inf, in place, what the three truncations exclude: min_p, then top-k, then top-p.

    logits: [num_rows, vocab_size] float32, already divided by temperature; top_k: [num_rows] int32,
    0 for off; top_p: [num_rows] float32, 1 for off; min_p: [num_rows] float32, 0 for off. min_p drops
    tokens less probable than min_p times the most probable (Nguyen et al. 2024, arXiv:2407.01082).
    top-k keeps every token that ties with the k-th, as vLLM does. top-p keeps the smallest set, most
    probable first and the lowest index first on ties, whose share of what is left reaches p, and at
    least one token (Holtzman et al. 2020, arXiv:1904.09751). A row without a finite maximum stays
    as it is.
    """
    usable = _has_finite_max(logits)
    masked = logits.clone()
    _keep(masked, masked >= masked.amax(-1, keepdim=True) + _log_ratio(min_p).unsqueeze(1))
    _keep(masked, masked >= _kth_largest(masked, top_k))
    _keep(masked, _nucleus(masked, top_p))
    logits.copy_(torch.where(usable, masked, logits))


def _keep(logits: torch.Tensor, kept: torch.Tensor) -> None:
    logits.masked_fill_(~kept, float("-inf"))


def _has_finite_max(logits: torch.Tensor) -> torch.Tensor:
    """Per row: no NaN or +inf and something that is not masked; [num_rows, 1] bool."""
    return logits.amax(-1, keepdim=True).isfinite()  # amax is NaN if anything is


def _log_ratio(min_p: torch.Tensor) -> torch.Tensor:
    """How far below the maximum min_p lets a logit lie: log(min_p), -inf for 0."""
    return min_p.double().log().float()


def _kth_largest(logits: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """[num_rows, 1]: each row's k-th largest value, -inf where top_k is off."""
    vocab_size = logits.shape[1]
    k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long()
    return logits.sort(dim=-1, descending=True).values.gather(1, k.unsqueeze(1) - 1)


def _nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[num_rows, vocab_size] bool: the tokens that top-p keeps."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    weights = (ordered - ordered[:, :1]).exp().double()
    reached = weights.cumsum(-1)
    target = torch.where(top_p < 1, top_p.double(), torch.inf) * reached[:, -1]
    kept = reached - weights < target.unsqueeze(1)
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(1, order, kept)


def top_k_top_p_min_p_cpu(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """The native `top_k_top_p_min_p_reference`, by selection instead of a sort.

    Keeps the same set, unless the cumulated probability lies within about 1e-7 of p. logits may have any row
    stride.
    """
    num_rows = logits.shape[0]
    log_ratio = _log_ratio(min_p)
    require("logits", logits, torch.float32, logits.shape, dense=1)
    require("top_k", top_k, torch.int32, (num_rows,))
    require("top_p", top_p, torch.float32, (num_rows,))
    require("min_p", log_ratio, torch.float32, (num_rows,))
    native.lib.top_k_top_p_min_p(
        logits.data_ptr(), top_k.data_ptr(), top_p.data_ptr(), log_ratio.data_ptr(),
        logits.shape, logits.stride(0),
    )  # fmt: skip


# Validity --------------------------------------------------------------------


def broken_rows(logits: torch.Tensor) -> torch.Tensor:
    """Which rows no token can be drawn from: they hold a NaN or +inf, or are all -inf. [num_rows] bool, where the
    logits are: nobody waits for it."""
    return ~_has_finite_max(logits).squeeze(1)


def nonfinite_rows_reference(logits: torch.Tensor) -> list[int]:
    """The numbers of `broken_rows`."""
    return broken_rows(logits).nonzero().squeeze(1).tolist()


def nonfinite_rows_cpu(logits: torch.Tensor) -> list[int]:
    """The native `nonfinite_rows_reference`. logits may have any row stride."""
    require("logits", logits, torch.float32, logits.shape, dense=1)
    broken = torch.empty(logits.shape[0], dtype=torch.uint8)
    native.lib.nonfinite_rows(broken.data_ptr(), logits.data_ptr(), logits.shape, logits.stride(0))
    return broken.nonzero().squeeze(1).tolist()


GUMBEL_ARGMAX_IMPLEMENTATIONS = [
    Impl(gumbel_argmax_cpu, native.float32_why_not),
    Impl("triton.sampling:gumbel_argmax", gpu.float32_why_not),
    Impl(gumbel_argmax_reference),
]
TOP_K_TOP_P_MIN_P_IMPLEMENTATIONS = [
    Impl(top_k_top_p_min_p_cpu, native.float32_why_not),
    Impl("cuda:top_k_top_p_min_p", cuda.truncation_why_not),
    Impl("triton.sampling:top_k_top_p_min_p", gpu.float32_why_not),
    Impl(top_k_top_p_min_p_reference),
]
NONFINITE_ROWS_IMPLEMENTATIONS = [Impl(nonfinite_rows_cpu, native.float32_why_not), Impl(nonfinite_rows_reference)]
gumbel_argmax = Op("gumbel_argmax", GUMBEL_ARGMAX_IMPLEMENTATIONS)
top_k_top_p_min_p = Op("top_k_top_p_min_p", TOP_K_TOP_P_MIN_P_IMPLEMENTATIONS)
nonfinite_rows = Op("nonfinite_rows", NONFINITE_ROWS_IMPLEMENTATIONS)
