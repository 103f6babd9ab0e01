"""Causal attention over a paged KV cache: prefill, decode and mixed batches by one op.

Owns the order of every sum in it. Keys and values lie in tiles of 32 absolute positions; a row's running
(maximum, sum, output) moves on by steps of 128 absolute positions, the tiles of a step in ascending order, within
segments of 1024 absolute positions, whatever a row's length, that are merged in ascending order. The maximum is what
weights are relative to: it moves to a step's own only when weights would exceed 2^8 without, so that outputs are
seldom rescaled. A segment's weights are summed lane by lane of the vectors, then folded. So a row's bits depend on
its own query and its own keys and values only: not on the batch, on how its prompt was chunked, on block size or
ids, on what is shared, or on the number of threads.

On AMX, queries in bfloat16 over a cache in bfloat16, fp8 or int8 are multiplied as bfloat16 with sums in float32, and
the weights, within 7.5e-5 of what they should be, are rounded to bfloat16 before they meet the values. All else is
float32 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minivllm.ops import gpu, native
from minivllm.ops.checks import require
from minivllm.ops.kv_layout import KvLayout, native_why_not
from minivllm.ops.kv_write import KvPlace, is_left_to_attention
from minivllm.ops.kv_write import reference as kv_write
from minivllm.ops.op import Impl, Op, OpSpec

STEP = 128  # absolute positions a row's running maximum moves on by; shared prefixes are cut to a multiple
_MOST_HEADS = 64  # query heads of one KV head that the kernel takes


@dataclass(frozen=True)
class Options:
    """How one layer's attention differs from the next one's."""

    scale: float  # of the scores
    sliding_window: int | None = None  # a row sees at most so many positions, its own included
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0: they stay
    sinks: torch.Tensor | None = None  # [num_heads] float32: a logit of the softmax that has no value
    alibi_slopes: torch.Tensor | None = None  # [num_heads] float32: times (key - query position), added
    k_scale: float = 1.0  # what the codes of an fp8 cache count in
    v_scale: float = 1.0


@dataclass(frozen=True)
class SharedPrefixes:
    """Groups of requests of one query row each, whose first `lens[g]` tokens lie in the same blocks.

    They are a promise about block_table, and a saving: blocks are then read once a group. No bit depends on them.
    """

    members: torch.Tensor  # [n] int32, requests, group by group
    group_starts: torch.Tensor  # [num_groups + 1] int32, in members
    lens: torch.Tensor  # [num_groups] int32, tokens, a multiple of STEP


def reference(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    layout: KvLayout,
    options: Options,
    shared: SharedPrefixes | None = None,
    write: KvPlace | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of each query row over its request's tokens (Kwon et al. 2023, arXiv:2309.06180).

    q: [num_tokens, num_heads, head_dim]; kv_cache: uint8, as `layout` says; block_table: [num_reqs, max_blocks]
    int32; seq_lens: [num_reqs] int32, in tokens, this step's included; query_start_loc: [num_reqs + 1] int32,
    ascending. The query rows of request b are its last positions; each sees the positions up to its own. write: where
    a step's own keys and values are, and where they go, if they are left to this.
    Returns [num_tokens, num_heads, head_dim], `out` if given; rows of no request are zero. Computed in float32
    from what the cache stores, and rounded once to q's dtype.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    out.zero_()
    if write is not None and write.kept is not None and is_left_to_attention(layout, len(q)):
        k, v = write.kept.chunk(2, dim=1)
        scales = {"k_scale": write.k_scale, "v_scale": write.v_scale}
        kv_write(k, v, kv_cache, write.slot_mapping, layout=layout, **scales)
    starts = query_start_loc.tolist()
    for b, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        pages = kv_cache[block_table[b, : -(-seq_len // layout.block_size)].long()]
        k = layout.read(pages, 0, options.k_scale).transpose(0, 1).flatten(1, 2)[:, :seq_len]
        v = layout.read(pages, 1, options.v_scale).transpose(0, 1).flatten(1, 2)[:, :seq_len]
        out[rows] = _attend(q[rows].float(), k, v, options).to(q.dtype)
    return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
    """q: [q_len, num_heads, head_dim], the last q_len positions of k and v: [num_kv_heads, seq_len, head_dim]."""
    q_len, num_heads, head_dim = q.shape
    num_kv_heads, seq_len, _ = k.shape
    group = num_heads // num_kv_heads
    grouped = q.reshape(q_len, num_kv_heads, group, head_dim)
    scores = torch.einsum("tkgd,ksd->kgts", grouped, k) * options.scale
    if options.softcap:
        scores = options.softcap * (scores / options.softcap).tanh()
    q_pos = torch.arange(seq_len - q_len, seq_len, device=q.device).unsqueeze(1)
    k_pos = torch.arange(seq_len, device=q.device)
    if options.alibi_slopes is not None:
        scores += options.alibi_slopes.view(num_kv_heads, group, 1, 1) * (k_pos - q_pos)
    visible = k_pos <= q_pos
    if options.sliding_window is not None:
        visible &= k_pos > q_pos - options.sliding_window
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.view(num_kv_heads, group, 1, 1).expand(-1, -1, q_len, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., :seq_len]
    return torch.einsum("kgts,ksd->tkgd", weights, v).reshape(q_len, num_heads, head_dim)


def cpu(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    layout: KvLayout,
    options: Options,
    shared: SharedPrefixes | None = None,
    write: KvPlace | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The native `reference`, in the order of sums the module promises. q may be a view with any row stride.

    Raises:
        IndexError: a block id, a sequence length, a query offset, a group's member or a slot lies outside its table.
        ValueError: a tensor is not laid out as `reference` says, or its sizes fit no kernel.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_blocks = kv_cache.shape[0]
    num_reqs, max_blocks = block_table.shape
    require("q", q, q.dtype, (num_tokens, num_heads, layout.head_dim), dense=1)
    require("kv_cache", kv_cache, torch.uint8, layout.shape(num_blocks))
    require("block_table", block_table, torch.int32, block_table.shape, dense=1)
    require("seq_lens", seq_lens, torch.int32, (num_reqs,))
    require("query_start_loc", query_start_loc, torch.int32, (num_reqs + 1,))
    for name, per_head in (("sinks", options.sinks), ("alibi_slopes", options.alibi_slopes)):
        if per_head is not None:
            require(name, per_head, torch.float32, (num_heads,))
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    require("out", out, q.dtype, q.shape)
    groups, group_sizes = (0, 0, 0), (0, 0)
    if shared is not None:
        group_sizes = (len(shared.lens), len(shared.members))
        require("members", shared.members, torch.int32, shared.members.shape)
        require("group_starts", shared.group_starts, torch.int32, (group_sizes[0] + 1,))
        require("lens", shared.lens, torch.int32, shared.lens.shape)
        groups = (shared.members.data_ptr(), shared.group_starts.data_ptr(), shared.lens.data_ptr())
    new = (0, 0)
    if write is not None and write.kept is not None:
        require("kept", write.kept, q.dtype, (num_tokens, 2 * layout.num_kv_heads, head_dim))
        require("slot_mapping", write.slot_mapping, torch.int64, (num_tokens,))
        new = (write.kept.data_ptr(), write.slot_mapping.data_ptr())
    native.lib.paged_attention(
        out.data_ptr(), q.data_ptr(), kv_cache.data_ptr(),
        (block_table.data_ptr(), seq_lens.data_ptr(), query_start_loc.data_ptr()), native.dtype_code(q), layout.code,
        (num_tokens, num_heads, head_dim), q.stride()[:2], (num_blocks, layout.num_kv_heads, layout.block_size),
        (num_reqs, max_blocks), block_table.stride(0), (options.scale, options.k_scale, options.v_scale),
        options.sliding_window or 0, options.softcap, (_pointer(options.sinks), _pointer(options.alibi_slopes)),
        groups, group_sizes, new,
    )  # fmt: skip
    return out


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def cpu_why_not(spec: OpSpec) -> str | None:
    if spec.sizes.get("group", 1) > _MOST_HEADS:
        return f"{spec.sizes['group']} query heads share a KV head, the kernel takes {_MOST_HEADS}"
    return native_why_not(spec)


IMPLEMENTATIONS = [
    Impl(cpu, cpu_why_not),
    Impl("triton.paged_attention:paged_attention", gpu.why_not),
    Impl(reference),
]
paged_attention = Op("paged_attention", IMPLEMENTATIONS)
