"""Rotary embedding with its norms, and the cache write of what comes of it: one pass, on a GPU one launch for three."""

from __future__ import annotations

import torch

from minivllm.ops import gpu, native
from minivllm.ops.checks import require
from minivllm.ops.kv_layout import KvLayout, RowLayout, native_why_not
from minivllm.ops.kv_write import reference as kv_write
from minivllm.ops.op import Impl, Op
from minivllm.ops.rotary import HeadNorms, native_arguments
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
    layout: KvLayout | RowLayout,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """`ops/rotary.py` of q and k, then `ops/kv_write.py` of k and v; shapes as there.

    q is turned in place. Whether k is as well is not promised: attention reads what the cache stores.
    """
    rotary(positions, q, k, cos_sin, norms)
    kv_write(k, v, kv_cache, slot_mapping, layout=layout, k_scale=k_scale, v_scale=v_scale)


def cpu(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: HeadNorms | None,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    layout: KvLayout,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """`reference` in C++, the bits of `rotary.cpu` and `kv_write.cpu`. k stays as it is.

    Raises:
        IndexError: a position or a slot is outside its table; nothing has been changed then.
        ValueError: a tensor is not laid out as `reference` says.
    """
    q_norm, k_norm, eps = native_arguments(positions, q, k, cos_sin, norms)
    num_tokens, num_kv_heads, head_dim = k.shape
    require("q", q, q.dtype, (num_tokens, q.shape[1], layout.head_dim), dense=1)
    require("k", k, q.dtype, (num_tokens, layout.num_kv_heads, layout.head_dim), dense=1)
    require("v", v, q.dtype, k.shape, dense=1)
    require("kv_cache", kv_cache, torch.uint8, layout.shape(len(kv_cache)))
    require("slot_mapping", slot_mapping, torch.int64, (num_tokens,))
    native.lib.rotary_kv_write(
        native.dtype_code(q), q.data_ptr(), q.shape[1], q.stride()[:2], q_norm,
        k.data_ptr(), k.stride()[:2], k_norm, eps, positions.data_ptr(), cos_sin.data_ptr(), *cos_sin.shape,
        v.data_ptr(), v.stride()[:2],
        kv_cache.data_ptr(), layout.code, (num_tokens, num_kv_heads, head_dim), (len(kv_cache), layout.block_size),
        slot_mapping.data_ptr(), k_scale, v_scale,
    )  # fmt: skip


IMPLEMENTATIONS = [
    Impl(cpu, native_why_not),
    Impl("triton.rotary:rotary_kv_write", gpu.why_not),
    Impl(reference),
]
rotary_kv_write = Op("rotary_kv_write", IMPLEMENTATIONS)
