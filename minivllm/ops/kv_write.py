"""Puts new keys and values into the paged cache. Knows slots; knows nothing of requests or blocks' owners."""

from __future__ import annotations

import torch

from minivllm.ops import native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op, OpSpec


def reference(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write each token's key and value into its slot, in place.

    k, v: [num_tokens, num_kv_heads, head_dim]; kv_cache: [num_blocks, 2, num_kv_heads, block_size,
    head_dim], layout "nhd-v1", of the same dtype; slot_mapping: [num_tokens] int64, each
    block_id * block_size + offset, or -1 for a token that is not to be written.
    """
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    block_size = kv_cache.shape[3]
    blocks, offsets = slots // block_size, slots % block_size
    kv_cache[blocks, 0, :, offsets] = k[written]
    kv_cache[blocks, 1, :, offsets] = v[written]


def cpu(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """The native `reference`. k and v may be views with any token and head stride.

    Raises:
        IndexError: a slot lies outside the cache; nothing has been written then.
        ValueError: a tensor is not laid out as `reference` says.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    num_blocks, _, _, block_size, _ = kv_cache.shape
    require("k", k, kv_cache.dtype, k.shape, dense=1)
    require("v", v, kv_cache.dtype, k.shape, dense=1)
    require("kv_cache", kv_cache, kv_cache.dtype, (num_blocks, 2, num_kv_heads, block_size, head_dim))
    require("slot_mapping", slot_mapping, torch.int64, (num_tokens,))
    native.lib.kv_write(
        kv_cache.data_ptr(), k.data_ptr(), v.data_ptr(), slot_mapping.data_ptr(), k.element_size(),
        (num_tokens, num_kv_heads, head_dim), k.stride()[:2], v.stride()[:2], (num_blocks, block_size),
    )  # fmt: skip


def cpu_why_not(spec: OpSpec) -> str | None:
    return native.why_not(spec)


IMPLEMENTATIONS = [Impl(cpu, cpu_why_not), Impl(reference)]
kv_write = Op("kv_write", IMPLEMENTATIONS)
