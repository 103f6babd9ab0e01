"""Masking logits by a grammar's bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.ops.bitmask import check_fit
from minivllm.ops.checks import require

_BLOCK = 2048


@triton.jit
def _bitmask_kernel(logits, rows, bits, row_stride, num_words, vocab_size, BLOCK: tl.constexpr):
    """Grid: (masked rows, blocks of tokens)."""
    at = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = tokens < vocab_size
    words = tl.load(bits + at * num_words + tokens // 32, mask=is_token, other=-1)
    is_forbidden = ((words >> (tokens % 32)) & 1) == 0
    row = tl.load(rows + at)
    places = logits + row * row_stride + tokens
    tl.store(places, tl.full([BLOCK], float("-inf"), tl.float32), mask=is_token & is_forbidden)


def apply_bitmask(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
    """`reference` of `ops/bitmask.py`. Which rows there are is not checked: it would be waited for."""
    require("logits", logits, torch.float32, logits.shape, dense=1)
    check_fit(logits, rows, bitmask)
    if len(rows):
        _bitmask_kernel[(len(rows), triton.cdiv(logits.shape[1], _BLOCK))](
            logits, rows, bitmask, logits.stride(0), bitmask.shape[1], logits.shape[1], BLOCK=_BLOCK, num_warps=4
        )
