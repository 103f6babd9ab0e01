"""Rotary embedding with its norms, and the cache write of what comes of it: on a GPU one launch for three.

For devices with a cache in a `RowLayout`: the Triton backend calls it (`attention/backends/triton.py`).
"""

from __future__ import annotations

import torch

from minivllm.ops import gpu
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.kv_write import reference as kv_write
from minivllm.ops.op import Impl, Op
from minivllm.ops.rotary import HeadNorms
from minivllm.ops.rotary import reference as rotary


def reference(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: HeadNorms | None,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    layout: RowLayout,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """`ops/rotary.py` of q and k in place, then `ops/kv_write.py` of k and v; shapes as there."""
    rotary(positions, q, k, cos_sin, norms)
    kv_write(k, v, kv_cache, slot_mapping, layout=layout, k_scale=k_scale, v_scale=v_scale)


IMPLEMENTATIONS = [Impl("triton.rotary:rotary_kv_write", gpu.why_not), Impl(reference)]
rotary_kv_write = Op("rotary_kv_write", IMPLEMENTATIONS)
