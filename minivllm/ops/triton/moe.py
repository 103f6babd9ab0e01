"""Fused mixture of experts: (token, expert) pairs sorted by expert, and two grouped matrix multiplications over them.

Which expert gets how many tokens is known only to the device, and nobody waits for it: the grid is as large as it could
have to be, and programs without work return. Every sum is one program's, in ascending order, and a token's experts are
added in the order they are named, so its bits do not depend on its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minivllm.ops.checks import require


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def choose_tile(dtype: torch.dtype) -> Tile:
    """Unmeasured (docs/gpu.md). Few tokens an expert: a tile of rows no larger than matrix instructions need."""
    return Tile(16, 32, 32, 4, 3) if dtype == torch.float32 else Tile(16, 64, 64, 4, 4)


class Grouping(NamedTuple):
    """Pairs by expert, each expert's padded to whole tiles of rows."""

    pairs: torch.Tensor  # [slots] int64: token * k + place, or -1
    experts: torch.Tensor  # [tiles] int64; the number of experts where a tile is empty


def group_by_expert(expert_ids: torch.Tensor, num_experts: int, rows: int) -> Grouping:
    """expert_ids: [T, k] int64. On the device throughout."""
    flat = expert_ids.flatten()
    num_slots = -(-(len(flat) + num_experts * (rows - 1)) // rows) * rows
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    padded = (counts + rows - 1) // rows * rows
    ends, starts = padded.cumsum(0), counts.cumsum(0) - counts
    order = flat.argsort(stable=True)
    expert = flat[order]
    slots = (ends - padded)[expert] + torch.arange(len(flat), device=flat.device) - starts[expert]
    pairs = torch.full((num_slots,), -1, dtype=torch.int64, device=flat.device).scatter_(0, slots, order)
    tiles = torch.arange(0, num_slots, rows, device=flat.device)
    return Grouping(pairs, torch.searchsorted(ends, tiles, right=True))


@triton.jit
def _grouped_kernel(
    out, x, weight, pairs, experts, pair_weights,
    num_experts, out_features, in_features, up_offset, out_stride, x_stride, expert_stride, weight_stride,
    PAIRS_A_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, IS_GATED: tl.constexpr,
):  # fmt: skip
    """out[pair] = x[pair // PAIRS_A_ROW] @ weight[expert].T, gated or weighted. Grid: (columns, rows)."""
    tile = tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert >= num_experts:
        return
    pair = tl.load(pairs + tile * ROWS + tl.arange(0, ROWS))
    is_row = pair >= 0
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < out_features
    depth = tl.arange(0, DEPTH)
    x_rows = x + (pair // PAIRS_A_ROW)[:, None] * x_stride
    weight_rows = weight + expert * expert_stride + columns.to(tl.int64)[None, :] * weight_stride
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, in_features, DEPTH):
        k = start + depth
        x_mask = is_row[:, None] & (k < in_features)[None, :]
        weight_mask = is_column[None, :] & (k < in_features)[:, None]
        a = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
        b = tl.load(weight_rows + k[:, None], mask=weight_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if IS_GATED:
            c = tl.load(weight_rows + up_offset + k[:, None], mask=weight_mask, other=0.0)
            up = tl.dot(a, c, up, input_precision="ieee")
    dtype: tl.constexpr = x.dtype.element_ty
    if IS_GATED:
        gate = acc.to(dtype).to(tl.float32)
        acc = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    else:
        acc = acc * tl.load(pair_weights + pair, mask=is_row, other=0.0)[:, None]
    places = out + pair[:, None] * out_stride + columns[None, :]
    tl.store(places, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def moe(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """`reference` of `ops/moe.py`; expert ids are not checked."""
    (num_tokens, hidden), (num_experts, double_inner, _) = x.shape, gate_up.shape
    inner, per_token = double_inner // 2, expert_ids.shape[1]
    require("x", x, x.dtype, x.shape, dense=1)
    require("gate_up", gate_up, x.dtype, (num_experts, 2 * inner, hidden), dense=2)
    require("down", down, x.dtype, (num_experts, hidden, inner), dense=2)
    require("expert_ids", expert_ids, torch.int64, (num_tokens, per_token))
    require("weights", weights, torch.float32, (num_tokens, per_token))
    if not num_tokens:
        return torch.empty_like(x)
    tile = choose_tile(x.dtype)
    grouping = group_by_expert(expert_ids, num_experts, tile.rows)
    between = torch.empty(num_tokens * per_token, inner, dtype=x.dtype, device=x.device)
    parts = torch.empty(num_tokens * per_token, hidden, dtype=torch.float32, device=x.device)
    for out, source, weight, width, is_gated in (
        (between, x, gate_up, inner, True),
        (parts, between, down, hidden, False),
    ):
        _grouped_kernel[(triton.cdiv(width, tile.columns), len(grouping.experts))](
            out, source, weight, *grouping, weights, num_experts, width, source.shape[1], width * weight.stride(1),
            out.stride(0), source.stride(0), weight.stride(0), weight.stride(1),
            PAIRS_A_ROW=per_token if is_gated else 1, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            IS_GATED=is_gated, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return parts.view(num_tokens, per_token, hidden).sum(1).to(x.dtype)
