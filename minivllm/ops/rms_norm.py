"""Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467), alone or after a residual addition.

Rounds where Hugging Face's norms do. Llama and Qwen: the normed value goes to x's dtype before the weight multiplies it
in that dtype. Gemma keeps a float32 weight, and only the product is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minivllm.ops import gpu, native
from minivllm.ops.op import Impl, Op


@dataclass(frozen=True)
class RowNorm:
    """A norm that is part of what reads its output."""

    weight: torch.Tensor  # [H], in the rows' dtype or in float32
    eps: float

    def arguments(self, x: torch.Tensor) -> tuple[int, int, float]:
        """For a kernel that norms x: [..., H]: the weight's address, its dtype's code, and epsilon.

        Raises:
            ValueError: the weight is not one of x, or not contiguous.
        """
        weight, hidden = self.weight, x.shape[-1]
        if weight.shape != (hidden,) or weight.dtype not in (x.dtype, torch.float32) or not weight.is_contiguous():
            raise ValueError(
                f"the norm's weight is {tuple(weight.shape)} {weight.dtype}; x needs ({hidden},) {x.dtype} or float32, "
                "contiguous"
            )
        return weight.data_ptr(), native.dtype_code(weight), self.eps


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32.

    x: [..., H]; weight: [H], in x's dtype or in float32. Returns [..., H] in x's dtype.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(x.dtype)


def add_reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x to `residual` in place, then `reference` of the sum. x, residual: [..., H] of one dtype."""
    residual.add_(x)
    return reference(residual, weight, eps)


def cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`reference` in C++. x: [..., H]; views of up to three dimensions are read where they lie."""
    x, outer, inner, x_strides = _rows(x)
    return _run(x, x_strides, 0, (0, 0), weight, outer, inner, eps)


def add_cpu(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`add_reference` in C++. x, residual: [..., H], at most three dimensions, last dimension contiguous."""
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype}; x needs {tuple(x.shape)} {x.dtype}"
        )
    if residual.dim() > 3 or residual.stride(-1) != 1:
        raise ValueError(
            f"residual of strides {residual.stride()} cannot be changed in place; make it contiguous"
        )
    x, outer, inner, x_strides = _rows(x)
    return _run(x, x_strides, residual.data_ptr(), _rows(residual)[3], weight, outer, inner, eps)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, tuple[int, int]]:
    """x as (outer, inner) rows, its two row strides; copied only where two strides cannot say it."""
    if x.dim() == 0:
        raise ValueError("x has no dimension to normalise over")
    if x.stride(-1) != 1 or x.dim() > 3:
        x = x.contiguous()
    if x.dim() == 3:
        return x, x.shape[0], x.shape[1], (x.stride(0), x.stride(1))
    if x.dim() == 2:
        return x, x.shape[0], 1, (x.stride(0), 0)
    rows = x.numel() // max(1, x.shape[-1])
    return x, rows, 1, (x.shape[-1], 0)


def _run(
    x: torch.Tensor,
    x_strides: tuple[int, int],
    residual: int,
    residual_strides: tuple[int, int],
    weight: torch.Tensor,
    outer: int,
    inner: int,
    eps: float,
) -> torch.Tensor:
    address, code, eps = RowNorm(weight, eps).arguments(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        native.lib.rms_norm(
            native.dtype_code(x), out.data_ptr(), x.data_ptr(), *x_strides, residual, *residual_strides,
            address, code, outer, inner, x.shape[-1], eps,
        )  # fmt: skip
    return out


IMPLEMENTATIONS = [
    Impl(cpu, why_not=native.why_not),
    Impl("triton.rms_norm:rms_norm", why_not=gpu.why_not),
    Impl(reference),
]
ADD_IMPLEMENTATIONS = [
    Impl(add_cpu, why_not=native.why_not),
    Impl("triton.rms_norm:add_rms_norm", why_not=gpu.why_not),
    Impl(add_reference),
]
rms_norm = Op("rms_norm", IMPLEMENTATIONS)
add_rms_norm = Op("add_rms_norm", ADD_IMPLEMENTATIONS)
