"""Noise, truncation, penalties, logprobs and masks over vocabularies of odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from minivllm.ops import bitmask, likeliest_tokens, penalties, sampling
from minivllm.ops.triton import bitmask as triton_bitmask
from minivllm.ops.triton import likeliest_tokens as triton_likeliest_tokens
from minivllm.ops.triton import penalties as triton_penalties
from minivllm.ops.triton import sampling as triton_sampling
from minivllm.ops.triton import token_logprobs as triton_token_logprobs
from tests.gpu.case import Case, Check, randn

Truncate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def logits_of(device: str, large: bool, vocab_size: int, num_rows: int) -> torch.Tensor:
    """Rows that lie apart, with ties, masked tokens, and one row each with a NaN, +inf, and nothing but -inf."""
    logits = randn(device, num_rows, (151936 if large else vocab_size) + 3).mul(4)[:, :-3]
    logits[:, ::3] = logits[:, ::3].round()
    logits[:, 5::7] = float("-inf")
    logits[1, 2], logits[2, 0], logits[3] = float("nan"), float("inf"), float("-inf")
    return logits


def gumbel(device: str, large: bool, *, vocab_size: int) -> Check:
    num_rows = 10
    logits = logits_of(device, large, vocab_size, num_rows)
    logits[9] = float("nan")
    temperature = torch.tensor([0, 1, 1, 1, 0.3, 0.7, 1, 1.7, 100, 1], device=device)
    seeds = torch.tensor([0, 1, 2, 3, -1, 1 << 62, -(1 << 63), 12345678901234567, 7, 8], device=device)
    positions = torch.tensor([0, 1, 2, 3, 4, 1 << 31, 1 << 32, (1 << 40) + 5, 100, 9], device=device)
    arguments = (logits, temperature, seeds, positions)

    def chosen(choose) -> tuple[torch.Tensor, ...]:
        tokens, broken = choose(*arguments)
        # A broken row's token means nothing, but it is one: the next step may look it up.
        is_inside = (tokens >= 0) & (tokens < logits.shape[1])
        return torch.where(broken > 0, -1, tokens), broken, is_inside

    return Check(
        lambda: chosen(triton_sampling.gumbel_argmax), lambda: chosen(sampling.gumbel_argmax_reference), 0.0
    )


def truncation(
    device: str, large: bool, *, vocab_size: int, truncate: Truncate = triton_sampling.top_k_top_p_min_p
) -> Check:
    logits = logits_of(device, large, vocab_size, 16)
    logits[12] = 1.5  # nothing but ties
    logits[13, :50] = 0.0
    logits[13, 10] = -0.0
    top_k = torch.tensor(
        [0, 5, 5, 5, 1, 20, 0, 0, 0, 50, 1 << 20, 17, 3, 30, 0, 7], dtype=torch.int32, device=device
    )
    top_p = torch.tensor(
        [1, 0.9, 0.9, 0.9, 1, 1, 0.01, 0.5, 0.95, 0.8, 0.9, 1, 0.5, 0.9, 1, 1e-9], device=device
    )
    min_p = torch.tensor([0, 0.1, 0.1, 0.1, 0, 0, 0, 0, 0, 0.01, 0, 0.2, 0, 0, 0.1, 0.0], device=device)

    return _truncated(truncate, logits, top_k, top_p, min_p)


def odd_truncation(
    device: str, large: bool, *, vocab_size: int, truncate: Truncate = triton_sampling.top_k_top_p_min_p
) -> Check:
    """Rows in which the cuts are not among a few of the likeliest: flat ones, ties, few tokens that are allowed."""
    vocab_size = 128256 if large else vocab_size
    flat, spread, wide = (randn(device, 1, vocab_size, seed=seed).mul(scale) for seed, scale in enumerate((0.02, 1, 8)))
    few, equal, spike = torch.full_like(flat, float("-inf")), torch.full_like(flat, -3.0), spread.clone()
    part = torch.where(torch.arange(vocab_size, device=device) % 33 == 1, wide, few)
    few[:, 30:50] = spread[:, :20]
    equal[:, 7] = -2.0
    spike[:, 5], spike[:, 6] = 70.0, 69.0
    far = torch.where(few.isfinite(), few * 1e37, few)  # so far apart that float32 holds no depth in bins
    far[:, 40] = torch.finfo(torch.float32).min  # of a mask that is not -inf
    rows: list[tuple[torch.Tensor, int, float, float]] = [
        (few, 50, 0.9, 0.0), (few, 5, 1.0, 0.0), (equal, 0, 0.3, 0.0), (equal, 2, 0.9, 0.0), (equal, 1, 0.9, 0.0),
        (spike, 50, 0.9, 0.0), (spike, 3, 1.0, 0.0), (wide, 0, 0.999, 0.0), (wide, 40, 0.9, 0.3), (wide, 0, 1e-6, 0.0),
        (part, vocab_size // 2, 0.9, 0.0), (part, vocab_size // 2, 1.0, 0.0), (part, vocab_size // 40, 0.999, 0.0),
        (far, 5, 1.0, 0.0), (far, 19, 1.0, 0.0), (far, 5, 0.9, 0.0),
    ]  # fmt: skip
    for row in (flat, spread, flat.bfloat16().float(), spread.bfloat16().float()):
        rows += [
            (row, 0, 0.9, 0.0), (row, 0, 0.5, 0.0), (row, vocab_size // 2, 1.0, 0.0), (row, vocab_size // 8, 0.95, 0.0),
            (row, 0, 0.9, 0.05), (row, 20, 1.0, 0.5),
        ]  # fmt: skip
    logits, top_k, top_p, min_p = zip(*rows)
    return _truncated(
        truncate, torch.cat(logits), torch.tensor(top_k, dtype=torch.int32, device=device),
        torch.tensor(top_p, device=device), torch.tensor(min_p, device=device),
    )  # fmt: skip


def _truncated(truncate: Truncate, logits: torch.Tensor, *asked: torch.Tensor) -> Check:
    def kept(truncate: Truncate) -> torch.Tensor:
        changed = logits.clone()
        truncate(changed, *asked)
        return changed

    return Check(lambda: kept(truncate), lambda: kept(sampling.top_k_top_p_min_p_reference), 0.0)


def token_logprobs(device: str, large: bool, *, vocab_size: int) -> Check:
    logits = logits_of(device, large, vocab_size, 5)[[0, 4]]
    tokens = torch.tensor([[3, 0, -1], [vocab_size - 1, 5, 1]], device=device)
    if vocab_size > 1024:  # many are asked for
        more = torch.arange(vocab_size, device=device).flip(0).expand(2, vocab_size)
        tokens = torch.cat([tokens, more], 1).contiguous()

    def expected() -> tuple[torch.Tensor, ...]:
        values = torch.log_softmax(logits.double(), -1).gather(1, tokens.clamp_min(0))
        ranks = (logits >= logits.gather(1, tokens[:, :1])).sum(1)
        return values.masked_fill(tokens < 0, float("-inf")), ranks

    return Check(lambda: triton_token_logprobs.token_logprobs(logits, tokens), expected, 2e-6)


def likeliest(device: str, large: bool, *, vocab_size: int) -> Check:
    logits = logits_of(device, large, vocab_size, 9)[3:]  # ties, and a row of nothing but -inf
    logits[1, ::2] = -0.0

    def found(find) -> tuple[torch.Tensor, ...]:
        return tuple(find(logits, num_tokens) for num_tokens in (1, 5, 20))

    return Check(
        lambda: found(triton_likeliest_tokens.likeliest_tokens), lambda: found(likeliest_tokens.reference), 0.0
    )


def masking(device: str, large: bool) -> Check:
    logits = randn(device, 5, 151936 if large else 5003)
    rng = np.random.default_rng(0)
    rows = torch.tensor([4, 1], device=device)
    words = rng.integers(0, 1 << 32, (2, -(-logits.shape[1] // 32) + 1), dtype=np.uint32)
    bits = torch.from_numpy(words.view(np.int32)).to(device)

    def masked(apply) -> torch.Tensor:
        changed = logits.clone()
        apply(changed, rows, bits)
        return changed

    return Check(lambda: masked(triton_bitmask.apply_bitmask), lambda: masked(bitmask.reference), 0.0)


def penalising(device: str, large: bool) -> Check:
    vocab_size = 151936 if large else 2503
    logits = randn(device, 4, vocab_size)
    rows = torch.tensor([5, 0, 3, 2], device=device)
    repetition, frequency, presence = torch.tensor(
        [[1.3, 1.0, 1.0, 0.7], [0.5, 0.0, 0.0, -0.2], [0.1, 0.0, 0.3, 0.0]], device=device
    )
    token_rows = torch.arange(600, device=device) % 6
    token_ids = torch.arange(600, device=device) * 7 % 311
    is_prompt = (torch.arange(600, device=device) % 3 == 0).to(torch.uint8)

    def penalised(count, penalise) -> tuple[torch.Tensor, ...]:
        counts = torch.zeros(6, vocab_size, dtype=torch.int32, device=device)
        count(counts, token_rows, token_ids, is_prompt)
        changed = logits.clone()
        penalise(changed, counts, rows, repetition, frequency, presence)
        return counts, changed

    return Check(
        lambda: penalised(triton_penalties.count_tokens, triton_penalties.apply_penalties),
        lambda: penalised(penalties.count_reference, penalties.reference),
        1e-6,
    )


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {"bitmask": masking, "penalties": penalising}
    found["truncation_of_odd_rows"] = partial(odd_truncation, vocab_size=1500)
    found["gumbel_argmax_8192"] = partial(gumbel, vocab_size=8192)  # no chunk that is not full
    for vocab_size in (130, 9001):
        found[f"gumbel_argmax_{vocab_size}"] = partial(gumbel, vocab_size=vocab_size)
        found[f"truncation_{vocab_size}"] = partial(truncation, vocab_size=min(vocab_size, 3001))
        found[f"likeliest_tokens_{vocab_size}"] = partial(likeliest, vocab_size=vocab_size)
        found[f"token_logprobs_{vocab_size}"] = partial(token_logprobs, vocab_size=vocab_size)
    return found


CASES = _cases()
