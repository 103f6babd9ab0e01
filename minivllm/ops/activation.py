"""The gated activation of Llama-style MLPs: SiLU(gate) * up (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch.nn import functional

from minivllm.ops import native
from minivllm.ops.op import Impl, Op


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; SiLU is computed in float32 and rounded before the product, as Hugging Face does.

    gate_up: [T, 2I], gate first. Returns [T, I].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate.float()).to(gate.dtype) * up


def cpu(gate_up: torch.Tensor) -> torch.Tensor:
    """`reference` in C++. gate_up: [T, 2I], last dimension contiguous, any row stride."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}; it must be [T, 2I]")
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype)
    if out.numel():
        native.lib.silu_mul(
            native.dtype_code(gate_up), out.data_ptr(), gate_up.data_ptr(), gate_up.stride(0), rows, width
        )
    return out


IMPLEMENTATIONS = [
    Impl(cpu, why_not=native.why_not),
    Impl(reference),
]
silu_mul = Op("silu_mul", IMPLEMENTATIONS)
