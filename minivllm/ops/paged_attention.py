"""Causal attention over a paged KV cache: prefill, decode and mixed batches by one op.

Owns the order of every sum in it. KV tiles are 32 absolute positions; a row's result is an online
softmax over tiles in ascending order within segments of 1024 absolute positions, segments merged
in ascending order. So a row's bits depend on its own query and its own keys and values only: not on
the batch, on how its prompt was chunked, on block size or ids, or on the number of threads.
"""

from __future__ import annotations

import torch

from minivllm.config.cache import KV_TILE
from minivllm.config.hf_config import HEAD_DIM_STEP
from minivllm.ops import native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op, OpSpec

SEGMENT = 1024  # absolute positions a segment; fixed, so that a row's sums never depend on its length


def reference(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of each query row over its request's tokens (Kwon et al. 2023, arXiv:2309.06180).

    q: [num_tokens, num_heads, head_dim]; kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim],
    layout "nhd-v1"; block_table: [num_reqs, max_blocks] int32; seq_lens: [num_reqs] int32, in tokens,
    this step's included; query_start_loc: [num_reqs + 1] int32, ascending. The query rows of request b
    are its last positions; each sees the positions up to its own, with `sliding_window` at most the
    last `sliding_window` of them. Returns [num_tokens, num_heads, head_dim]; rows past the last request
    are zero. Computed in float32 and rounded once to q's dtype.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    starts = query_start_loc.tolist()
    for b, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        k, v = _gather(kv_cache, block_table[b], seq_len)
        out[rows] = _attend(q[rows].float(), k, v, scale, sliding_window).to(q.dtype)
    return out


def _gather(kv_cache: torch.Tensor, blocks: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A request's keys and values, each [num_kv_heads, seq_len, head_dim] in float32."""
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_blocks = -(-seq_len // block_size)
    pages = kv_cache[blocks[:num_blocks].long()].float()
    kv = pages.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, num_blocks * block_size, head_dim)
    return kv[0, :, :seq_len], kv[1, :, :seq_len]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """q: [q_len, num_heads, head_dim], the last q_len positions of k and v: [num_kv_heads, seq_len, head_dim]."""
    q_len, num_heads, head_dim = q.shape
    num_kv_heads, seq_len, _ = k.shape
    group = num_heads // num_kv_heads
    grouped = q.reshape(q_len, num_kv_heads, group, head_dim)
    scores = torch.einsum("tkgd,ksd->kgts", grouped, k) * scale
    q_pos = torch.arange(seq_len - q_len, seq_len, device=q.device).unsqueeze(1)
    k_pos = torch.arange(seq_len, device=q.device)
    visible = k_pos <= q_pos
    if sliding_window is not None:
        visible &= k_pos > q_pos - sliding_window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("kgts,ksd->tkgd", weights, v).reshape(q_len, num_heads, head_dim)


def cpu(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """The native `reference`, in the order of sums the module promises. q may be a view with any row stride.

    Raises:
        IndexError: a block id, a sequence length or a query offset lies outside its table.
        ValueError: a tensor is not laid out as `reference` says, or its sizes fit no kernel.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, _, num_kv_heads, block_size, _ = kv_cache.shape
    num_reqs, max_blocks = block_table.shape
    require("q", q, kv_cache.dtype, q.shape, dense=1)
    require("kv_cache", kv_cache, kv_cache.dtype, (num_blocks, 2, num_kv_heads, block_size, head_dim))
    require("block_table", block_table, torch.int32, block_table.shape, dense=1)
    require("seq_lens", seq_lens, torch.int32, (num_reqs,))
    require("query_start_loc", query_start_loc, torch.int32, (num_reqs + 1,))
    out = torch.empty(q.shape, dtype=q.dtype)
    native.lib.paged_attention(
        out.data_ptr(), q.data_ptr(), kv_cache.data_ptr(),
        block_table.data_ptr(), seq_lens.data_ptr(), query_start_loc.data_ptr(), native.dtype_code(q),
        (num_tokens, num_heads, head_dim), q.stride()[:2], (num_blocks, num_kv_heads, block_size),
        (num_reqs, max_blocks), block_table.stride(0), scale, sliding_window or 0,
    )  # fmt: skip
    return out


def cpu_why_not(spec: OpSpec) -> str | None:
    head_dim, block_size = spec.sizes.get("head_dim", HEAD_DIM_STEP), spec.sizes.get("block_size", KV_TILE)
    if head_dim % HEAD_DIM_STEP:
        return f"head_dim {head_dim} is not a multiple of {HEAD_DIM_STEP}"
    if block_size % KV_TILE:
        return f"block size {block_size} is not a multiple of the KV tile of {KV_TILE} tokens; try --block-size 128"
    return native.why_not(spec)


IMPLEMENTATIONS = [Impl(cpu, cpu_why_not), Impl(reference)]
paged_attention = Op("paged_attention", IMPLEMENTATIONS)
