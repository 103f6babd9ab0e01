"""Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467).

Rounds where Hugging Face's Llama and Qwen norms do: the normed value goes to x's dtype before the weight
multiplies it in that dtype.
"""

from __future__ import annotations

import torch

from minivllm.ops import native
from minivllm.ops.op import Impl, Op


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32.

    x: [..., H]; weight: [H], in x's dtype. Returns [..., H] in x's dtype.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`reference` in C++. x: [..., H]; views of up to three dimensions are read where they lie."""
    x, outer, inner, strides = _rows(x)
    hidden = x.shape[-1]
    if weight.shape != (hidden,) or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight is {tuple(weight.shape)} {weight.dtype}; x needs ({hidden},) {x.dtype}, contiguous"
        )
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        native.lib.rms_norm(
            native.dtype_code(x), out.data_ptr(), x.data_ptr(), *strides, weight.data_ptr(), outer, inner, hidden, eps
        )
    return out


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


IMPLEMENTATIONS = [
    Impl(cpu, why_not=native.why_not),
    Impl(reference),
]
rms_norm = Op("rms_norm", IMPLEMENTATIONS)
