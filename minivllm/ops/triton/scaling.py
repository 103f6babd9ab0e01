"""Scaling by a factor and soft caps, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.ops.checks import require

_BLOCK = 1024


@triton.jit
def _scale_kernel(x, count, factor, IS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(x + places, mask=places < count, other=0.0).to(tl.float32)
    if IS_CAP:
        numbers = factor * (1.0 - 2.0 / (tl.exp(2.0 * numbers / factor) + 1.0))
    else:
        numbers = numbers * factor
    tl.store(x + places, numbers.to(x.dtype.element_ty), mask=places < count)


def scale(x: torch.Tensor, factor: float) -> None:
    """`scale_reference` of `ops/scaling.py`."""
    _run(x, factor, is_cap=False)


def soft_cap(x: torch.Tensor, cap: float) -> None:
    """`soft_cap_reference` of it."""
    _run(x, cap, is_cap=True)


def _run(x: torch.Tensor, factor: float, *, is_cap: bool) -> None:
    require("x", x, x.dtype, x.shape)
    if x.numel():
        _scale_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, x.numel(), float(factor), IS_CAP=is_cap, BLOCK=_BLOCK
        )
