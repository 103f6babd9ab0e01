"""Norms of the heads, rotation and, where asked, the cache write, in one launch: q and k are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.ops.checks import require
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.rotary import HeadNorms
from minivllm.ops.triton.kv_write import store_rows, typed


@triton.jit
def _rotate(
    x, head_stride, is_head, cos, sin, weight, eps, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Turn a token's heads in place; x: at the first head. Returns both halves and what is not turned, in float32."""
    dtype: tl.constexpr = x.dtype.element_ty
    heads = tl.arange(0, HEADS)
    dims, rest_dims = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_REST)
    is_half = is_head[:, None] & (dims < HALF)[None, :]
    is_rest = is_head[:, None] & (rest_dims < REST)[None, :]
    places = x + heads[:, None] * head_stride + dims[None, :]
    rest_places = x + heads[:, None] * head_stride + 2 * HALF + rest_dims[None, :]
    first = tl.load(places, mask=is_half, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=is_half, other=0.0).to(tl.float32)
    rest = tl.zeros([HEADS, BLOCK_REST], tl.float32)
    if REST > 0:
        rest = tl.load(rest_places, mask=is_rest, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        factor = tl.rsqrt(squares / (2 * HALF + REST) + eps)[:, None]
        first_weight = tl.load(weight + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
        second_weight = tl.load(weight + HALF + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
        first = ((first * factor).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
        second = ((second * factor).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
        if REST > 0:
            rest_weight = tl.load(weight + 2 * HALF + rest_dims, mask=rest_dims < REST, other=0.0).to(
                tl.float32
            )
            rest = ((rest * factor).to(dtype).to(tl.float32) * rest_weight[None, :]).to(dtype).to(tl.float32)
            tl.store(rest_places, rest.to(dtype), mask=is_rest)
    turned_first = (first * cos[None, :] - second * sin[None, :]).to(dtype)
    turned_second = (second * cos[None, :] + first * sin[None, :]).to(dtype)
    tl.store(places, turned_first, mask=is_half)
    tl.store(places + HALF, turned_second, mask=is_half)
    return turned_first.to(tl.float32), turned_second.to(tl.float32), rest


@triton.jit
def _rotary_kernel(
    positions, q, k, v, cos_sin, q_weight, k_weight, cache, scales, slot_mapping,
    num_positions, eps, k_scale, v_scale,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    block_stride, half_stride, head_stride, scale_block_stride, scale_half_stride, scale_head_stride,
    GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_CACHE: tl.constexpr, IS_FP8: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tokens, num_kv_heads): a KV head with the query heads that share it."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token)
    dims = tl.arange(0, BLOCK_HALF)
    # A position outside the table gives NaN: a device cannot raise.
    position = tl.where(position < num_positions, position, -1)
    is_known = (dims < HALF) & (position >= 0)
    cos = tl.load(cos_sin + position * (2 * HALF) + dims, mask=is_known, other=float("nan"))
    sin = tl.load(cos_sin + position * (2 * HALF) + HALF + dims, mask=is_known, other=float("nan"))
    group = tl.arange(0, BLOCK_GROUP)
    _rotate(
        q + token * q_token_stride + kv_head * GROUP * q_head_stride, q_head_stride, group < GROUP, cos, sin,
        q_weight, eps, HALF, REST, BLOCK_GROUP, BLOCK_HALF, BLOCK_REST, HAS_NORM,
    )  # fmt: skip
    one = tl.arange(0, 1)
    first, second, rest = _rotate(
        k + token * k_token_stride + kv_head * k_head_stride, k_head_stride, one < 1, cos, sin,
        k_weight, eps, HALF, REST, 1, BLOCK_HALF, BLOCK_REST, HAS_NORM,
    )  # fmt: skip
    if HAS_CACHE:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            row = (
                cache + block * block_stride + kv_head.to(tl.int64) * head_stride + offset * (2 * HALF + REST)
            )
            scale_place = row + one
            if IS_INT8:
                scale_place = scales + block * scale_block_stride + kv_head * scale_head_stride + offset + one
            # As one row again, so that int8 finds its scale over all of it. What was stored is read back from k.
            all_dims = tl.arange(0, BLOCK_DIM)
            is_element = (one < 1)[:, None] & (all_dims < 2 * HALF + REST)[None, :]
            tl.debug_barrier()
            key_places = (
                k + token * k_token_stride + kv_head * k_head_stride + all_dims[None, :] + one[:, None]
            )
            keys = tl.load(key_places, mask=is_element, other=0.0).to(tl.float32)
            places = row + all_dims[None, :] + one[:, None]
            store_rows(keys, is_element, one < 1, places, scale_place, k_scale, IS_FP8, IS_INT8)
            value_places = (
                v + token * v_token_stride + kv_head * v_head_stride + all_dims[None, :] + one[:, None]
            )
            values = tl.load(value_places, mask=is_element, other=0.0).to(tl.float32)
            if IS_INT8:
                scale_place += scale_half_stride
            store_rows(
                values, is_element, one < 1, places + half_stride, scale_place, v_scale, IS_FP8, IS_INT8
            )


def rotary(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """`reference` of `ops/rotary.py`, but a position outside the table gives NaN. q and k may be views."""
    _run(positions, q, k, None, cos_sin, norms, None, None, None, 1.0, 1.0)


def rotary_kv_write(
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
    """`reference` of `ops/rotary_kv_write.py`."""
    require("v", v, k.dtype, k.shape, dense=1)
    require("kv_cache", kv_cache, torch.uint8, layout.shape(len(kv_cache)))
    require("slot_mapping", slot_mapping, torch.int64, (len(q),))
    _run(positions, q, k, v, cos_sin, norms, kv_cache, slot_mapping, layout, k_scale, v_scale)


def _run(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cos_sin: torch.Tensor,
    norms: HeadNorms | None,
    kv_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    layout: RowLayout | None,
    k_scale: float,
    v_scale: float,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, half = k.shape[1], cos_sin.shape[1] // 2
    require("q", q, q.dtype, (num_tokens, num_heads, head_dim), dense=1)
    require("k", k, q.dtype, (num_tokens, num_kv_heads, head_dim), dense=1)
    require("positions", positions, torch.int64, (num_tokens,))
    require("cos_sin", cos_sin, torch.float32, cos_sin.shape)
    if num_heads % num_kv_heads or 2 * half > head_dim:
        raise ValueError(
            f"{num_heads} heads of {head_dim} do not fit {num_kv_heads} KV heads or a table of {2 * half}"
        )
    for name, weight in zip(("q_weight", "k_weight"), norms or ()):
        require(name, weight, q.dtype, (head_dim,))
    if not num_tokens:
        return
    elements, scales = typed(kv_cache, layout) if layout is not None else (None, None)
    group, rest = num_heads // num_kv_heads, head_dim - 2 * half
    strides = elements.stride()[:3] if elements is not None else (0, 0, 0)
    scale_strides = scales.stride()[:3] if scales is not None else (0, 0, 0)
    _rotary_kernel[(num_tokens, num_kv_heads)](
        positions, q, k, v, cos_sin, norms and norms.q_weight, norms and norms.k_weight, elements, scales, slot_mapping,
        cos_sin.shape[0], norms.eps if norms else 0.0, k_scale, v_scale,
        *q.stride()[:2], *k.stride()[:2], *(v.stride()[:2] if v is not None else (0, 0)), *strides, *scale_strides,
        GROUP=group, BLOCK_GROUP=triton.next_power_of_2(group), HALF=half, BLOCK_HALF=triton.next_power_of_2(half),
        REST=rest, BLOCK_REST=triton.next_power_of_2(max(1, rest)), BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=layout.block_size if layout is not None else 1, HAS_NORM=norms is not None,
        HAS_CACHE=layout is not None, IS_FP8=layout is not None and layout.dtype == "fp8_e4m3",
        IS_INT8=scales is not None, num_warps=2,
    )  # fmt: skip
