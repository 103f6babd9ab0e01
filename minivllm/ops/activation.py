"""The gated activations of MLPs, act(gate) * up: SiLU and GELU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from minivllm.ops import gpu, native
from minivllm.ops.op import Impl, Op


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; SiLU is computed in float32 and rounded before the product, as Hugging Face does.

    gate_up: [T, 2I], gate first. Returns [T, I].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate.float()).to(gate.dtype) * up


_GELU_SCALE = 2 * math.sqrt(2 / math.pi)


def gelu_tanh_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The same with GELU in its approximation by tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    x/2 (1 + tanh u) is x sigmoid(2u), which keeps the digits that 1 + tanh u loses where u is far below zero.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    x = gate.float()
    return (x * torch.sigmoid(_GELU_SCALE * (x + 0.044715 * x.pow(3)))).to(gate.dtype) * up


def cpu(gate_up: torch.Tensor) -> torch.Tensor:
    """`reference` in C++. gate_up: [T, 2I], last dimension contiguous, any row stride."""
    return _run(native.lib.silu_mul, gate_up)


def gelu_tanh_cpu(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu_tanh_reference` in C++. gate_up: [T, 2I], last dimension contiguous, any row stride."""
    return _run(native.lib.gelu_tanh_mul, gate_up)


def _run(kernel: Callable[..., None], gate_up: torch.Tensor) -> torch.Tensor:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}; it must be [T, 2I]")
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype)
    if out.numel():
        kernel(native.dtype_code(gate_up), out.data_ptr(), gate_up.data_ptr(), gate_up.stride(0), rows, width)
    return out


SILU_MUL_IMPLEMENTATIONS = [
    Impl(cpu, why_not=native.why_not),
    Impl("triton.activation:silu_mul", why_not=gpu.why_not),
    Impl(reference),
]
silu_mul = Op("silu_mul", SILU_MUL_IMPLEMENTATIONS)
GELU_TANH_MUL_IMPLEMENTATIONS = [
    Impl(gelu_tanh_cpu, why_not=native.why_not),
    Impl("triton.activation:gelu_tanh_mul", why_not=gpu.why_not),
    Impl(gelu_tanh_reference),
]
gelu_tanh_mul = Op("gelu_tanh_mul", GELU_TANH_MUL_IMPLEMENTATIONS)
