"""SiLU(gate) * up and GELU(gate) * up."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

_GELU_SCALE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_BLOCK = 1024


@triton.jit
def _gated_kernel(out, gate_up, width, row_stride, IS_GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < width
    places = gate_up + row * row_stride + columns
    gate = tl.load(places, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(places + width, mask=is_column, other=0.0).to(tl.float32)
    u = gate
    if IS_GELU:
        u = _GELU_SCALE * (gate + 0.044715 * gate * gate * gate)
    active = (gate / (1.0 + tl.exp(-u))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, (active * up).to(out.dtype.element_ty), mask=is_column)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`reference` of `ops/activation.py`. gate_up: [T, 2I], last dimension contiguous, any row stride."""
    return _run(gate_up, is_gelu=False)


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu_tanh_reference` of it."""
    return _run(gate_up, is_gelu=True)


def _run(gate_up: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}; it must be [T, 2I]")
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        _gated_kernel[(rows, triton.cdiv(width, _BLOCK))](
            out, gate_up, width, gate_up.stride(0), IS_GELU=is_gelu, BLOCK=_BLOCK, num_warps=4
        )
    return out
