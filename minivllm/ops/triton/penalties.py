"""Repetition, frequency and presence penalties over counts that live on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.ops.checks import require
from minivllm.ops.penalties import IN_PROMPT

_BLOCK = 2048
_IN_PROMPT = tl.constexpr(IN_PROMPT)


@triton.jit
def _penalise_kernel(
    logits,
    counts,
    rows,
    repetition,
    frequency,
    presence,
    row_stride,
    counts_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Grid: (num_rows, blocks of tokens)."""
    at = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    again, often, ever = tl.load(repetition + at), tl.load(frequency + at), tl.load(presence + at)
    if (again == 1.0) & (often == 0.0) & (ever == 0.0):
        return
    places = logits + at * row_stride + tokens
    row = tl.load(rows + at)
    seen = tl.load(counts + row * counts_stride + tokens, mask=tokens < vocab_size, other=0)
    is_seen = seen != 0
    x = tl.load(places, mask=is_seen, other=0.0)
    x = tl.where(x > 0.0, tl.div_rn(x, tl.zeros_like(x) + again), x * again)
    num_output = (seen & (_IN_PROMPT - 1)).to(tl.float32)
    x = x - often * num_output - ever * tl.where(num_output > 0.0, 1.0, 0.0)
    tl.store(places, x, mask=is_seen)


@triton.jit(do_not_specialize=["num_tokens"])  # one code, and no compiler, for any number of tokens
def _count_kernel(
    counts, rows, token_ids, is_prompt, counts_stride, vocab_size, num_tokens, BLOCK: tl.constexpr
):
    """Grid: (blocks of tokens,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < num_tokens
    token = tl.load(token_ids + at, mask=is_there, other=-1)
    is_there = is_there & (token >= 0) & (token < vocab_size)
    row = tl.load(rows + at, mask=is_there, other=0)
    places = counts + row * counts_stride + token
    prompt = tl.load(is_prompt + at, mask=is_there, other=0) != 0
    tl.atomic_or(places, tl.full([BLOCK], _IN_PROMPT, tl.int32), mask=is_there & prompt)
    tl.atomic_add(places, tl.full([BLOCK], 1, tl.int32), mask=is_there & (prompt == 0))


def apply_penalties(
    logits: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> None:
    """`reference` of `ops/penalties.py`. Rows that ask for nothing cost nothing; logits may have any row stride."""
    num_rows, vocab_size = logits.shape
    require("logits", logits, torch.float32, logits.shape, dense=1)
    require("counts", counts, torch.int32, (len(counts), vocab_size), dense=1)
    require("rows", rows, torch.int64, (num_rows,))
    for name, each in (("repetition", repetition), ("frequency", frequency), ("presence", presence)):
        require(name, each, torch.float32, (num_rows,))
    if num_rows:
        _penalise_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
            logits, counts, rows, repetition, frequency, presence, logits.stride(0), counts.stride(0), vocab_size,
            BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def count_tokens(
    counts: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, is_prompt: torch.Tensor
) -> None:
    """`count_reference` of `ops/penalties.py`; ids outside the vocabulary are passed over."""
    num_tokens = len(token_ids)
    require("counts", counts, torch.int32, counts.shape, dense=1)
    require("rows", rows, torch.int64, (num_tokens,))
    require("token_ids", token_ids, torch.int64, (num_tokens,))
    require("is_prompt", is_prompt, torch.uint8, (num_tokens,))
    if num_tokens:
        _count_kernel[(triton.cdiv(num_tokens, 256),)](
            counts, rows, token_ids, is_prompt, counts.stride(0), counts.shape[1], num_tokens, BLOCK=256
        )
