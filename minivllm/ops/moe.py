"""A mixture of experts: each token goes through a few of many gated MLPs (Shazeer et al. 2017, arXiv:1701.06538).

No model calls it yet.
"""

from __future__ import annotations

import torch

from minivllm.ops import gpu
from minivllm.ops.activation import reference as silu_mul
from minivllm.ops.op import Impl, Op


def reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Sum over a token's experts of weight * down(silu_mul(gate_up(x))), the products summed in float32.

    x: [T, H]; gate_up: [E, 2I, H], gate first; down: [E, H, I]; expert_ids: [T, k] int64, distinct in a row; weights:
    [T, k] float32. Gate, up and their product are rounded to x's dtype, the sum once. Returns [T, H].
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in expert_ids.unique().tolist():
        rows, place = (expert_ids == expert).nonzero(as_tuple=True)
        inner = silu_mul((x[rows].float() @ gate_up[expert].float().t()).to(x.dtype))
        y = inner.float() @ down[expert].float().t()
        out.index_add_(0, rows, y * weights[rows, place].unsqueeze(1))
    return out.to(x.dtype)


IMPLEMENTATIONS = [Impl("triton.moe:moe", gpu.why_not), Impl(reference)]
moe = Op("moe", IMPLEMENTATIONS)
