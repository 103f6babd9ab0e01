"""Masking logits by a grammar's bits."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

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


def apply_bitmask(logits: torch.Tensor, rows: np.ndarray, bitmask: np.ndarray) -> None:
    """`reference` of `ops/bitmask.py`: the bits are made by the host and copied, without waiting, to the device."""
    num_words = bitmask.shape[1]
    require("logits", logits, torch.float32, logits.shape, dense=1)
    if rows.dtype != np.int64 or bitmask.dtype != np.uint32:
        raise ValueError(f"rows are {rows.dtype} and bits {bitmask.dtype}; they must be int64 and uint32")
    if bitmask.shape[0] != len(rows) or 32 * num_words < logits.shape[1]:
        raise ValueError(f"bits {bitmask.shape} do not fit {len(rows)} rows of {logits.shape[1]} logits")
    if len(rows) and not (0 <= rows.min() and rows.max() < logits.shape[0]):
        raise ValueError(f"rows {rows.min()} … {rows.max()} are not all among {logits.shape[0]}")
    if len(rows):
        words = torch.from_numpy(np.ascontiguousarray(bitmask).view(np.int32)).to(
            logits.device, non_blocking=True
        )
        which = torch.from_numpy(rows).to(logits.device, non_blocking=True)
        _bitmask_kernel[(len(rows), triton.cdiv(logits.shape[1], _BLOCK))](
            logits, which, words, logits.stride(0), num_words, logits.shape[1], BLOCK=_BLOCK, num_warps=4
        )
