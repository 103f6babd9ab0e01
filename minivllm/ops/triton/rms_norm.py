"""RMS norm, alone or fused with the residual addition: one pass over memory, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    out, x, residual, weight, inner, x_outer_stride, x_inner_stride, residual_outer_stride, residual_inner_stride,
    hidden, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (outer * inner,). A row is in one tile, so its sum has one order, whatever the batch."""
    row = tl.program_id(0).to(tl.int64)
    outer_index, inner_index = row // inner, row % inner
    columns = tl.arange(0, BLOCK)
    is_column = columns < hidden
    x_places = x + outer_index * x_outer_stride + inner_index * x_inner_stride + columns
    wide = tl.load(x_places, mask=is_column, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        places = (
            residual + outer_index * residual_outer_stride + inner_index * residual_inner_stride + columns
        )
        total = (tl.load(places, mask=is_column, other=0.0).to(tl.float32) + wide).to(
            residual.dtype.element_ty
        )
        tl.store(places, total, mask=is_column)
        wide = total.to(tl.float32)
    factors = tl.load(weight + columns, mask=is_column, other=0.0, eviction_policy="evict_last")
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    product = normed.to(weight.dtype.element_ty).to(tl.float32) * factors.to(tl.float32)
    tl.store(out + row * hidden + columns, product.to(out.dtype.element_ty), mask=is_column)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`reference` of `ops/rms_norm.py`. x: [..., H]; views of up to three dimensions are read where they lie."""
    return _run(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`add_reference` of it. x, residual: [..., H], at most three dimensions, the last one contiguous."""
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype}; x needs {tuple(x.shape)} {x.dtype}"
        )
    if residual.dim() > 3 or residual.stride(-1) != 1:
        raise ValueError(
            f"residual of strides {residual.stride()} cannot be changed in place; make it contiguous"
        )
    return _run(x, residual, weight, eps)


def _run(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    hidden = x.shape[-1]
    if (
        weight.shape != (hidden,)
        or weight.dtype not in (x.dtype, torch.float32)
        or not weight.is_contiguous()
    ):
        raise ValueError(
            f"weight is {tuple(weight.shape)} {weight.dtype}; x needs ({hidden},) {x.dtype} or float32, contiguous"
        )
    if x.dim() > 3 or x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        inner = x.shape[1] if x.dim() == 3 else 1
        block = triton.next_power_of_2(hidden)
        _rms_norm_kernel[(out.numel() // hidden,)](
            out, x, residual, weight, inner, *_row_strides(x), *(_row_strides(x if residual is None else residual)),
            hidden, eps, HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return out


def _row_strides(x: torch.Tensor) -> tuple[int, int]:
    """Of the first and the second dimension, where there are so many; over four dimensions, x is contiguous."""
    if x.dim() == 3:
        return x.stride(0), x.stride(1)
    return (x.stride(0), 0) if x.dim() == 2 else (x.shape[-1], 0)
