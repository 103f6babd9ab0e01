"""Puts new keys and values into the paged cache. Knows slots; knows nothing of requests or blocks' owners."""

from __future__ import annotations

from typing import NamedTuple

import torch

from minivllm.ops import gpu, native
from minivllm.ops.checks import require
from minivllm.ops.kv_layout import KvLayout, native_why_not
from minivllm.ops.op import Impl, Op


class KvPlace(NamedTuple):
    """Where a layer's new keys and values go, and how: as in `reference`.

    kept: [num_tokens, 2 * num_kv_heads, head_dim], where a step that `is_left_to_attention` has them for
    `ops/paged_attention.py` to write; None: none does.
    """

    kv_cache: torch.Tensor
    slot_mapping: torch.Tensor
    layout: KvLayout
    k_scale: float = 1.0
    v_scale: float = 1.0
    kept: torch.Tensor | None = None


def is_left_to_attention(layout: KvLayout, num_tokens: int) -> bool:
    """Whether attention writes a step's keys and values, if it may: csrc/cpu/kv_write.h decides, and says why."""
    return layout.dtype == "bfloat16" and 1 < num_tokens <= 64


def reference(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    layout: KvLayout,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write each token's key and value into its slot, in place, rounded to the cache's type.

    k, v: [num_tokens, num_kv_heads, head_dim]; kv_cache: uint8, as `layout` says; slot_mapping: [num_tokens]
    int64, each block_id * block_size + offset, or -1 for a token that is not to be written. k_scale, v_scale:
    what fp8 codes count in; int8 takes its scale from each token's own key and value.
    """
    written = slot_mapping >= 0
    layout.write(kv_cache, 0, slot_mapping[written], k[written], k_scale)
    layout.write(kv_cache, 1, slot_mapping[written], v[written], v_scale)


def cpu(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    layout: KvLayout,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """The native `reference`, to the bit. k and v may be views with any token and head stride.

    Raises:
        IndexError: a slot lies outside the cache; nothing has been written then.
        ValueError: a tensor is not laid out as `reference` says.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    num_blocks = kv_cache.shape[0]
    require("k", k, k.dtype, (num_tokens, layout.num_kv_heads, layout.head_dim), dense=1)
    require("v", v, k.dtype, k.shape, dense=1)
    require("kv_cache", kv_cache, torch.uint8, layout.shape(num_blocks))
    require("slot_mapping", slot_mapping, torch.int64, (num_tokens,))
    native.lib.kv_write(
        kv_cache.data_ptr(), k.data_ptr(), v.data_ptr(), slot_mapping.data_ptr(), native.dtype_code(k), layout.code,
        (num_tokens, num_kv_heads, head_dim), k.stride()[:2], v.stride()[:2], (num_blocks, layout.block_size),
        k_scale, v_scale,
    )  # fmt: skip


IMPLEMENTATIONS = [
    Impl(cpu, native_why_not),
    Impl("triton.kv_write:kv_write", gpu.why_not),
    Impl(reference),
]
kv_write = Op("kv_write", IMPLEMENTATIONS)
