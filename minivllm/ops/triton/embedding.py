"""Rows of a table by token id."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.ops.checks import require

_BLOCK = 1024


@triton.jit
def _gather_kernel(out, ids, table, num_rows, width, row_stride, BLOCK: tl.constexpr):
    """Grid: (ids, blocks of columns)."""
    at = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + at)
    row = tl.where(row < num_rows, row, -1)
    is_there = (columns < width) & (row >= 0)
    found = tl.load(table + row * row_stride + columns, mask=is_there, other=float("nan"))
    tl.store(out + at * width + columns, found, mask=columns < width)


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`reference` of `ops/embedding.py`, but an id outside the table gives NaN: a device cannot raise."""
    require("ids", ids, torch.int64, (len(ids),))
    require("weight", weight, weight.dtype, weight.shape, dense=1)
    num_rows, width = weight.shape
    out = torch.empty(len(ids), width, dtype=weight.dtype, device=weight.device)
    if out.numel():
        _gather_kernel[(len(ids), triton.cdiv(width, _BLOCK))](
            out, ids, weight, num_rows, width, weight.stride(0), BLOCK=_BLOCK, num_warps=4
        )
    return out
