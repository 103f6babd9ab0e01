"""Numbers changed where they lie, as Gemma does to embeddings and logits: scaled by a factor, or capped softly."""

from __future__ import annotations

import torch

from minivllm.ops import gpu, native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op


def scale_reference(x: torch.Tensor, factor: float) -> None:
    """x becomes factor * x, computed in float32 and rounded once. x: any shape, contiguous."""
    x.mul_(factor)


def soft_cap_reference(x: torch.Tensor, cap: float) -> None:
    """x becomes cap * tanh(x / cap), in float32 and rounded once. x: any shape, contiguous; cap > 0."""
    x.copy_(cap * (x.float() / cap).tanh())


def scale_cpu(x: torch.Tensor, factor: float) -> None:
    """`scale_reference` in C++."""
    require("x", x, x.dtype, x.shape)
    native.lib.scale(native.dtype_code(x), x.data_ptr(), x.numel(), factor)


def soft_cap_cpu(x: torch.Tensor, cap: float) -> None:
    """`soft_cap_reference` in C++."""
    require("x", x, x.dtype, x.shape)
    native.lib.soft_cap(native.dtype_code(x), x.data_ptr(), x.numel(), cap)


SCALE_IMPLEMENTATIONS = [
    Impl(scale_cpu, why_not=native.why_not),
    Impl("triton.scaling:scale", why_not=gpu.why_not),
    Impl(scale_reference),
]
scale = Op("scale", SCALE_IMPLEMENTATIONS)
SOFT_CAP_IMPLEMENTATIONS = [
    Impl(soft_cap_cpu, why_not=native.why_not),
    Impl("triton.scaling:soft_cap", why_not=gpu.why_not),
    Impl(soft_cap_reference),
]
soft_cap = Op("soft_cap", SOFT_CAP_IMPLEMENTATIONS)
