"""New keys and values into a `RowLayout` cache, in float8 or int8 where that is its type."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.ops.checks import require
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.triton.numerics import round_half_even

_FP8_MAX = tl.constexpr(448.0)


@triton.jit
def store_rows(
    values, is_element, is_row, places, scale_places, scale, IS_FP8: tl.constexpr, IS_INT8: tl.constexpr
):
    """Store float32 rows [n, dims] as the cache's type. int8: a row has a scale, NaN (and codes of 0) if not finite."""
    if IS_INT8:
        largest = tl.max(tl.abs(values), 1)
        is_broken = tl.max(tl.where(values - values == 0.0, 0, 1), 1) > 0
        scales = tl.where(
            is_broken, float("nan"), tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
        )
        divisors = tl.where(scales > 0.0, scales, 1.0)[:, None] + tl.zeros_like(values)
        codes = round_half_even(tl.div_rn(values, divisors))
        codes = tl.where((scales > 0.0)[:, None], codes, 0.0)
        tl.store(places, codes.to(tl.int8), mask=is_element)
        tl.store(scale_places, scales, mask=is_row)
    elif IS_FP8:
        scaled = tl.div_rn(values, tl.zeros_like(values) + scale)
        scaled = tl.where(
            scaled > _FP8_MAX, _FP8_MAX, tl.where(scaled < -_FP8_MAX, -_FP8_MAX, scaled)
        )  # keeps NaN
        tl.store(places, scaled.to(tl.float8e4nv), mask=is_element)
    else:
        tl.store(places, values.to(places.dtype.element_ty), mask=is_element)


@triton.jit
def _kv_write_kernel(
    k, v, cache, scales, slot_mapping, k_scale, v_scale,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    block_stride, half_stride, head_stride, scale_block_stride, scale_half_stride, scale_head_stride,
    NUM_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, IS_FP8: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    heads, dims = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_DIM)
    is_row = heads < NUM_HEADS
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    places = cache + block * block_stride + heads[:, None] * head_stride + offset * HEAD_DIM + dims[None, :]
    scale_places = places  # of no use but for int8
    if IS_INT8:
        scale_places = scales + block * scale_block_stride + heads * scale_head_stride + offset
    k_places = k + token * k_token_stride + heads[:, None] * k_head_stride + dims[None, :]
    keys = tl.load(k_places, mask=is_element, other=0.0).to(tl.float32)
    store_rows(keys, is_element, is_row, places, scale_places, k_scale, IS_FP8, IS_INT8)
    v_places = v + token * v_token_stride + heads[:, None] * v_head_stride + dims[None, :]
    values = tl.load(v_places, mask=is_element, other=0.0).to(tl.float32)
    if IS_INT8:
        scale_places += scale_half_stride
    store_rows(values, is_element, is_row, places + half_stride, scale_places, v_scale, IS_FP8, IS_INT8)


_ELEMENTS = {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}


def typed(kv_cache: torch.Tensor, layout: RowLayout) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The cache as its elements, and as its scales if it has some; [num_blocks, 2, heads, …] both."""
    elements = kv_cache.flatten(3).view(_ELEMENTS.get(layout.dtype, layout.element_type))
    if layout.dtype != "int8":
        return elements, None
    return elements, kv_cache.flatten(3).view(torch.float32)[..., -layout.block_size :]


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    layout: RowLayout,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """`reference` of `ops/kv_write.py`, to the bit. k and v may have any strides; slots are not checked."""
    num_tokens, num_heads, head_dim = k.shape
    require("k", k, k.dtype, (num_tokens, layout.num_kv_heads, layout.head_dim), dense=1)
    require("v", v, k.dtype, k.shape, dense=1)
    require("kv_cache", kv_cache, torch.uint8, layout.shape(len(kv_cache)))
    require("slot_mapping", slot_mapping, torch.int64, (num_tokens,))
    if not num_tokens:
        return
    elements, scales = typed(kv_cache, layout)
    block_heads, block_dim = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim)
    _kv_write_kernel[(num_tokens,)](
        k, v, elements, scales, slot_mapping, k_scale, v_scale, *k.stride()[:2], *v.stride()[:2],
        *elements.stride()[:3], *(scales.stride()[:3] if scales is not None else (0, 0, 0)),
        NUM_HEADS=num_heads, BLOCK_HEADS=block_heads, HEAD_DIM=head_dim, BLOCK_DIM=block_dim,
        BLOCK_SIZE=layout.block_size, IS_FP8=layout.dtype == "fp8_e4m3", IS_INT8=scales is not None,
        num_warps=min(8, max(1, block_heads * block_dim // 256)),
    )  # fmt: skip
