"""Paged attention in Triton: prefill, decode and mixed batches by one launch, and one more that merges split decodes.

A program takes a tile of query rows (some tokens of one request, times the heads that share one KV head) through the
request's keys, TILE absolute positions at a time, ascending (FlashAttention-2: Dao 2023, arXiv:2307.08691). Requests
of few query rows are split along their keys at fixed borders, every SEGMENT absolute positions, and programs share the
segments (`choose_num_parts`); `_merge_kernel` adds the parts up, ascending (split-KV as in FlashDecoding, Dao et al.
2023).

Two ways to choose tiles:
- as fast as may be: small query tiles for decode, large ones for prefill, which is not cut into segments;
- batch invariant: one query tile, so one matrix instruction, for both, and prefill adds up the same segments in the
  same order in its registers. A row's bits then depend on its own query, keys and values only.

Nothing is tuned at run time: that would make the first requests slow, its result depends on what else the card does,
and another tile is another order of sums. `_TILES` is all there is. Nor is a kernel compiled anew for another size of
the batch (`do_not_specialize`: Triton would, for 1 and for multiples of 16), which would stop a server for seconds.

A NaN among a request's own values reaches the rows before it that share a query tile (0 × NaN); the CPU's kernels
keep it from them. Another request's never does: what lies outside [window start, length) counts as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minivllm.ops.checks import require
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.paged_attention import Options

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an older Triton, as torch 2.6 brings: nothing is fetched by the copy engine
    TensorDescriptor = None

SEGMENT = 1024  # absolute positions; DESIGN's, and the CPU's
_LOG2E = tl.constexpr(1.4426950408889634)
_NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
_MERGED_AT_ONCE = 8
_LEAST_PARTS, _MOST_PROGRAMS = 8, 16384


@dataclass(frozen=True)
class Tiles:
    """How one launch is cut."""

    rows: int  # query rows of a program: tokens times heads of a KV head; at least 16, as tl.dot needs
    keys: int  # positions; divides SEGMENT
    num_warps: int
    num_stages: int  # tiles of keys and values in shared memory, or one more


@dataclass(frozen=True)
class BatchShape:
    """What the host knows of a batch without asking the device. Bounds will do: what is beyond them must not be."""

    max_query_len: int
    max_seq_len: int
    max_split_query_len: int = 1  # requests of more query rows are not split along their keys


# By kind of batch and head_dim, rounded up to a power of two: rows, keys, warps, stages. float32 has tiles of its own:
# it uses no tensor cores, and its keys take twice the room.
_TILES = {
    "decode": {64: Tiles(16, 128, 4, 4), 128: Tiles(16, 64, 4, 4), 256: Tiles(16, 64, 4, 3)},
    "prefill": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 2)},
    # Where the copy engine fetches keys and values (`_can_fetch`).
    "fetched": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 3)},
    "invariant": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(64, 32, 8, 2)},
    "float32": {64: Tiles(16, 32, 4, 3), 128: Tiles(16, 32, 4, 3), 256: Tiles(16, 16, 4, 3)},
}


def choose_tiles(
    head_dim: int, group: int, dot_dtype: torch.dtype, max_query_len: int, *, batch_invariant: bool,
    is_fetched: bool = False,
) -> Tiles:  # fmt: skip
    """group: query heads that share a KV head; all of a token's are in one program; is_fetched: of prefill."""
    if dot_dtype == torch.float32:
        kind = "float32"
    elif batch_invariant:
        kind = "invariant"
    else:
        kind = "decode" if max_query_len == 1 else "fetched" if is_fetched else "prefill"
    tiles = _TILES[kind][max(64, triton.next_power_of_2(head_dim))]
    rows = max(tiles.rows, triton.next_power_of_2(group))
    return Tiles(rows, tiles.keys, tiles.num_warps, tiles.num_stages)


def choose_num_parts(num_tiles: int, max_segments: int) -> int:
    """How many programs share the segments of a decode's request; num_tiles: requests times KV heads.

    A decode is launched for the longest request that there may be (a captured one for --max-model-len). Whose request
    has fewer segments finds nothing to do: it reads three numbers and ends, which should take about a microsecond of a
    place in which two or three others wait for memory, so that 16,384 of them are some 40 µs of a Hopper card, none of
    it measured. A batch that fills the card anyway gets no more than 8 programs a tile; a request much longer than the
    others is then done by these 8 alone.
    """
    return min(max_segments, max(_LEAST_PARTS, _MOST_PROGRAMS // max(1, num_tiles)))


# Kernels ---------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """Within 1.5e-7, not relatively."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * _LOG2E)) + 1.0)


@triton.jit
def _weight(from_max, to_max):
    """2^(from - to), and 0 where nothing has been seen yet. Both are base-2 logarithms."""
    return tl.where(from_max == _NEGATIVE_INFINITY, 0.0, tl.exp2(from_max - to_max))


@triton.jit
def _load_blocks(table, start, first_read, end_read, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The block of a tile that lies in one, else of each of its positions; 0 outside [first_read, end_read)."""
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table + start // BLOCK_SIZE, mask=start < end_read, other=0)
    else:
        positions = start + tl.arange(0, TILE)
        is_read = (positions >= first_read) & (positions < end_read)
        return tl.load(table + positions // BLOCK_SIZE, mask=is_read, other=0)


@triton.jit
def _walk(
    acc, top, total, q, row_positions,
    kv, kv_tiles, head_row, scales, table, first, end, first_read, end_read,
    block_stride, half_stride, scale_block_stride, scale_half_stride,
    scale, softcap, slopes,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, IS_INT8: tl.constexpr,
    IS_MASKED: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Carry (sum of values, maximum, sum of weights) of each row over the tiles of positions [first, end).

    kv, scales, table: at the request's row and the KV head; head_row: the KV head's first row of `kv_tiles`, see
    `_can_fetch`, or None. Only positions [first_read, end_read) are read. Not
    IS_MASKED promises that every row sees every position.
    """
    IS_PLAIN: tl.constexpr = not (HAS_SOFTCAP or HAS_ALIBI or IS_INT8)
    dims = tl.arange(0, BLOCK_DIM)
    # Block ids are fetched a tile ahead, so that a load of keys in the pipeline has not to wait for one of ids.
    next_block = _load_blocks(table, first, first_read, end_read, BLOCK_SIZE, TILE)
    for start in range(first, end, TILE):
        positions = start + tl.arange(0, TILE)
        is_read = (positions >= first_read) & (positions < end_read)
        block = next_block.to(tl.int64)
        next_block = _load_blocks(table, start + TILE, first_read, end_read, BLOCK_SIZE, TILE)
        if BLOCK_SIZE % TILE == 0:
            offsets = (start % BLOCK_SIZE + tl.arange(0, TILE)).to(tl.int64)
        else:
            offsets = (positions % BLOCK_SIZE).to(tl.int64)
        rows = kv + block * block_stride + offsets * HEAD_DIM
        places = rows[:, None] + dims[None, :]
        if HEAD_DIM != BLOCK_DIM:
            is_loaded = is_read[:, None] & (dims < HEAD_DIM)[None, :]
            keys = tl.load(places, mask=is_loaded, other=0.0)
            values = tl.load(places + half_stride, mask=is_loaded, other=0.0)
        elif IS_MASKED:
            keys = tl.load(places, mask=is_read[:, None], other=0.0)
            values = tl.load(places + half_stride, mask=is_read[:, None], other=0.0)
        elif kv_tiles is not None:
            row = block.to(tl.int32) * (block_stride // HEAD_DIM) + head_row + start % BLOCK_SIZE
            keys = kv_tiles.load([row, 0])
            values = kv_tiles.load([row + half_stride // HEAD_DIM, 0])
        else:
            keys = tl.load(places)
            values = tl.load(places + half_stride)

        if IS_INT8:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        scores = tl.dot(q, tl.trans(keys.to(DOT_DTYPE)), input_precision="ieee")
        if not IS_PLAIN:
            scores = scores * scale
        if IS_INT8:
            scale_places = scales + block * scale_block_stride + offsets
            key_scales = tl.load(scale_places, mask=is_read, other=0.0)
            value_scales = tl.load(scale_places + scale_half_stride, mask=is_read, other=0.0)
            scores = scores * key_scales[None, :]
        if HAS_SOFTCAP:
            scores = softcap * _tanh(scores / softcap)
        if HAS_ALIBI:
            scores += slopes[:, None] * (positions[None, :] - row_positions[:, None]).to(tl.float32)
        if not IS_PLAIN:
            scores = scores * _LOG2E
        if IS_MASKED:
            is_seen = positions[None, :] <= row_positions[:, None]
            if WINDOW > 0:
                is_seen = is_seen & (positions[None, :] > row_positions[:, None] - WINDOW)
            scores = tl.where(is_seen, scores, _NEGATIVE_INFINITY)

        if IS_PLAIN:
            # Scaled as the maximum is taken off, which is one instruction: softmax is as long as a product.
            to_log2 = scale * _LOG2E
            new_top = tl.maximum(top, tl.max(scores, 1) * to_log2)
            safe_top = tl.where(new_top == _NEGATIVE_INFINITY, 0.0, new_top)
            weights = tl.exp2(scores * to_log2 - safe_top[:, None])
        else:
            new_top = tl.maximum(top, tl.max(scores, 1))
            safe_top = tl.where(new_top == _NEGATIVE_INFINITY, 0.0, new_top)
            weights = tl.exp2(scores - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        total = total * shrink + tl.sum(weights, 1)
        if IS_INT8:
            weights = weights * value_scales[None, :]
        acc = tl.dot(
            weights.to(DOT_DTYPE), values.to(DOT_DTYPE), acc * shrink[:, None], input_precision="ieee"
        )
        top = new_top
    return acc, top, total


@triton.jit
def _finish(acc, top, total, sinks, value_scale, HAS_SINKS: tl.constexpr):
    """acc / total, with the sink's share in the total; rows that saw nothing are 0. sinks: one a row."""
    if HAS_SINKS:
        sink = sinks * _LOG2E
        last = tl.maximum(top, sink)
        shrink = _weight(top, last)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(sink - last)
    total = tl.where(total == 0.0, 1.0, total)
    return acc / total[:, None] * value_scale


@triton.jit
def _request_of(query_start_loc, tile, num_reqs, TOKENS: tl.constexpr):
    """Tiles are numbered over the batch: those of request b begin at query_start_loc[b] // TOKENS + b, which leaves
    room enough for each and is known without a sum over requests."""
    req, last = tile * 0, num_reqs - 1  # a tensor, in the interpreter too
    while req < last:
        middle = (req + last + 1) // 2
        is_before = tl.load(query_start_loc + middle) // TOKENS + middle <= tile
        req = tl.where(is_before, middle, req)
        last = tl.where(is_before, last, middle - 1)
    return req


@triton.jit
def _walk_segments(
    q, row_positions, kv, kv_tiles, head_row, scales, table, begin, end, first_read,
    block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SEGMENT: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    IS_INT8: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """What `_walk` carries, of the positions [begin, end): one segment after another, each from nothing, then added to
    those before. (No fused multiply-adds: whether there is one must not depend on which kernel adds up.)"""
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    top = tl.full([ROWS], _NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for border in range(begin // SEGMENT * SEGMENT, end, SEGMENT):
        part_acc, part_top, part_total = _walk(
            tl.zeros([ROWS, BLOCK_DIM], tl.float32), tl.full([ROWS], _NEGATIVE_INFINITY, tl.float32),
            tl.zeros([ROWS], tl.float32), q, row_positions, kv, kv_tiles, head_row, scales, table,
            tl.maximum(begin, border), tl.minimum(end, border + SEGMENT), first_read, end,
            block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
            HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, HAS_SOFTCAP, HAS_ALIBI, IS_INT8, True, DOT_DTYPE,
        )  # fmt: skip
        new_top = tl.maximum(top, part_top)
        old_weight, part_weight = _weight(top, new_top), _weight(part_top, new_top)
        acc = acc * old_weight[:, None] + part_acc * part_weight[:, None]
        total = total * old_weight + part_total * part_weight
        top = new_top
    return acc, top, total


@triton.jit
def _walk_at_once(
    q, row_positions, kv, kv_tiles, head_row, scales, table, begin, end, first_read, first_position, end_position,
    block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, IS_INT8: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """What `_walk` carries, of the positions [begin, end). The rows' own positions: [first_position, end_position).

    Between first_free and end_free every row sees every position, and no mask is needed.
    """
    first_free = begin
    if WINDOW > 0:
        first_free = tl.cdiv(tl.maximum(end_position - WINDOW, 0), TILE) * TILE
    end_free = (first_position + 1) // TILE * TILE
    first_free = tl.minimum(tl.maximum(first_free, begin), end)
    end_free = tl.maximum(tl.minimum(end_free, end // TILE * TILE), first_free)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    top = tl.full([ROWS], _NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if WINDOW > 0:
        acc, top, total = _walk(
            acc, top, total, q, row_positions, kv, kv_tiles, head_row, scales, table, begin, first_free,
            first_read, end, block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
            HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, HAS_SOFTCAP, HAS_ALIBI, IS_INT8, True, DOT_DTYPE,
        )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, q, row_positions, kv, kv_tiles, head_row, scales, table, first_free, end_free, first_read, end,
        block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
        HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, HAS_SOFTCAP, HAS_ALIBI, IS_INT8, False, DOT_DTYPE,
    )  # fmt: skip
    return _walk(
        acc, top, total, q, row_positions, kv, kv_tiles, head_row, scales, table, end_free, end, first_read, end,
        block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
        HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, HAS_SOFTCAP, HAS_ALIBI, IS_INT8, True, DOT_DTYPE,
    )  # fmt: skip


@triton.jit
def _attend_part(
    out_places, part_acc, part_top, part, is_row, is_element, sinks, value_scale, is_whole,
    q, row_positions, kv, kv_tiles, head_row, scales, table, begin, end, first_read, first_position, end_position,
    block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SEGMENT: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, IS_INT8: tl.constexpr, IS_INVARIANT: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile's attention to the positions [begin, end): to `out_places` if that is_whole, else to the rows' `part`."""
    if IS_INVARIANT:
        acc, top, total = _walk_segments(
            q, row_positions, kv, kv_tiles, head_row, scales, table, begin, end, first_read,
            block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
            HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, ROWS, TILE, SEGMENT, WINDOW, HAS_SOFTCAP, HAS_ALIBI, IS_INT8, DOT_DTYPE,
        )  # fmt: skip
    else:
        acc, top, total = _walk_at_once(
            q, row_positions, kv, kv_tiles, head_row, scales, table, begin, end,
            first_read, first_position, end_position,
            block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
            HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, ROWS, TILE, WINDOW, HAS_SOFTCAP, HAS_ALIBI, IS_INT8, DOT_DTYPE,
        )  # fmt: skip
    if is_whole:
        result = _finish(acc, top, total, sinks, value_scale, HAS_SINKS)
        tl.store(out_places, result.to(out_places.dtype.element_ty), mask=is_element)
    else:
        tl.store(part_acc + part[:, None] * HEAD_DIM + tl.arange(0, BLOCK_DIM)[None, :], acc, mask=is_element)
        tl.store(part_top + part * 2, top, mask=is_row)
        tl.store(part_top + part * 2 + 1, total, mask=is_row)


@triton.jit(do_not_specialize=["num_reqs", "max_segments"])
def _attend_kernel(
    out, q, kv, kv_tiles, scales, block_table, seq_lens, query_start_loc, part_acc, part_top, sink_logits, alibi_slopes,
    num_reqs, max_segments, scale, softcap, value_scale,
    out_token_stride, q_token_stride, q_head_stride, table_stride,
    block_stride, half_stride, head_stride,
    scale_block_stride, scale_half_stride, scale_head_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr,
    SPLIT_LEN: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, IS_INT8: tl.constexpr, IS_INVARIANT: tl.constexpr, IS_DECODE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid: (query tiles, num_kv_heads, segments). IS_DECODE: no request has more than one row, so a tile is a request,
    and where there are fewer programs than segments each takes every so-manieth.

    Long queries, which come late, are started first.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    req = tile if IS_DECODE else _request_of(query_start_loc, tile, num_reqs, TOKENS)
    first_token = tl.load(query_start_loc + req)
    query_len = tl.load(query_start_loc + req + 1) - first_token
    seq_len = tl.load(seq_lens + req)
    first_query = 0 if IS_DECODE else (tile - (first_token // TOKENS + req)) * TOKENS
    if first_query >= query_len:
        return
    first_position = seq_len - query_len + first_query
    end_position = first_position + TOKENS
    first_read = tl.maximum(first_position - WINDOW + 1, 0) if WINDOW > 0 else 0
    end_read = tl.minimum(end_position, seq_len)
    # A request that is not split has one part, which is all of it.
    is_split = query_len <= SPLIT_LEN
    segment, end_segment = tl.program_id(2), 1
    if is_split:
        segment, end_segment = segment + first_read // SEGMENT, tl.cdiv(end_read, SEGMENT)
    if segment >= end_segment:
        return

    rows = tl.arange(0, ROWS)
    queries, heads = first_query + rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = (rows < TOKENS * GROUP) & (queries < query_len)
    tokens = (first_token + queries).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIM)
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    q_places = tokens[:, None] * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
    queries_tile = tl.load(q + q_places, mask=is_element, other=0.0).to(DOT_DTYPE)
    out_places = out + tokens[:, None] * out_token_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    row_positions = seq_len - query_len + queries
    slopes, sinks = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(alibi_slopes + heads, mask=is_row, other=0.0)
    if HAS_SINKS:
        sinks = tl.load(sink_logits + heads, mask=is_row, other=0.0)
    head_kv = kv + kv_head.to(tl.int64) * head_stride
    head_row = kv_head * (head_stride // HEAD_DIM)
    head_scales = scales
    if IS_INT8:
        head_scales = scales + kv_head.to(tl.int64) * scale_head_stride
    table = block_table + req.to(tl.int64) * table_stride
    first_part = req.to(tl.int64) * max_segments * SPLIT_LEN * NUM_HEADS + queries * NUM_HEADS + heads
    begin, end = first_read // TILE * TILE, end_read
    is_whole = (query_len > SPLIT_LEN) | (seq_len <= SEGMENT)
    if IS_DECODE:
        for part in range(segment, end_segment, tl.num_programs(2)):
            _attend_part(
                out_places, part_acc, part_top, first_part + part * (SPLIT_LEN * NUM_HEADS), is_row, is_element, sinks,
                value_scale, is_whole, queries_tile, row_positions, head_kv, kv_tiles, head_row, head_scales, table,
                tl.maximum(begin, part * SEGMENT), tl.minimum(end, (part + 1) * SEGMENT),
                first_read, first_position, end_position,
                block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
                HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, ROWS, TILE, SEGMENT, WINDOW, HAS_SOFTCAP, HAS_SINKS, HAS_ALIBI,
                IS_INT8, IS_INVARIANT, DOT_DTYPE,
            )  # fmt: skip
    else:
        # Not a loop of one round: what would be kept for another costs registers that a tile of many rows has not.
        if is_split:
            begin, end = tl.maximum(begin, segment * SEGMENT), tl.minimum(end, (segment + 1) * SEGMENT)
        _attend_part(
            out_places, part_acc, part_top, first_part + segment * (SPLIT_LEN * NUM_HEADS), is_row, is_element, sinks,
            value_scale, is_whole, queries_tile, row_positions, head_kv, kv_tiles, head_row, head_scales, table,
            begin, end, first_read, first_position, end_position,
            block_stride, half_stride, scale_block_stride, scale_half_stride, scale, softcap, slopes,
            HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, ROWS, TILE, SEGMENT, WINDOW, HAS_SOFTCAP, HAS_SINKS, HAS_ALIBI,
            IS_INT8, IS_INVARIANT, DOT_DTYPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["max_segments"])
def _merge_kernel(
    out, part_acc, part_top, seq_lens, query_start_loc, sink_logits, max_segments, value_scale, out_token_stride,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SEGMENT: tl.constexpr,
    SPLIT_LEN: tl.constexpr, WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add up the segments of split requests, ascending. Grid: (num_reqs, SPLIT_LEN, num_heads)."""
    req, query, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_token = tl.load(query_start_loc + req)
    query_len = tl.load(query_start_loc + req + 1) - first_token
    seq_len = tl.load(seq_lens + req)
    if (query >= query_len) | (query_len > SPLIT_LEN) | (seq_len <= SEGMENT):
        return
    # The segments that some row of the request sees, which are those that were written. One that this row does not
    # see holds (0, -inf, 0) and changes nothing.
    first_position = seq_len - query_len
    first = tl.maximum(first_position - WINDOW + 1, 0) // SEGMENT if WINDOW > 0 else 0
    end = tl.cdiv(seq_len, SEGMENT)
    dims = tl.arange(0, BLOCK_DIM)
    acc = tl.zeros([1, BLOCK_DIM], tl.float32)
    top = tl.full([1], _NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros([1], tl.float32)
    row = req.to(tl.int64) * max_segments * SPLIT_LEN * NUM_HEADS + query * NUM_HEADS + head
    for start in range(first, end, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # unrolled: the loads do not wait for the sums
            segment = start + i + tl.arange(0, 1)
            is_there = segment < end
            part = row + segment * (SPLIT_LEN * NUM_HEADS)
            part_top_ = tl.load(part_top + part * 2, mask=is_there, other=_NEGATIVE_INFINITY)
            part_total_ = tl.load(part_top + part * 2 + 1, mask=is_there, other=0.0)
            places = part[:, None] * HEAD_DIM + dims[None, :]
            part_acc_ = tl.load(
                part_acc + places, mask=is_there[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
            )
            new_top = tl.maximum(top, part_top_)
            old_weight, part_weight = _weight(top, new_top), _weight(part_top_, new_top)
            acc = acc * old_weight[:, None] + part_acc_ * part_weight[:, None]
            total = total * old_weight + part_total_ * part_weight
            top = new_top
    sinks = tl.zeros([1], tl.float32)
    if HAS_SINKS:
        sinks = tl.load(sink_logits + head + tl.arange(0, 1))
    result = _finish(acc, top, total, sinks, value_scale, HAS_SINKS)
    token = (first_token + query).to(tl.int64)
    places = token * out_token_stride + head * HEAD_DIM + dims[None, :]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=(dims < HEAD_DIM)[None, :])


# Launch ----------------------------------------------------------------------

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def scratch_shape(num_reqs: int, shape: BatchShape, num_heads: int, head_dim: int) -> tuple[int, ...]:
    """Of the float32 tensor that holds split requests' parts: their sums, then maximum and total of each."""
    num_segments = triton.cdiv(shape.max_seq_len, SEGMENT)
    return (num_reqs, num_segments, shape.max_split_query_len, num_heads, head_dim + 2)


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    layout: RowLayout,
    options: Options,
    shared: object = None,
    out: torch.Tensor | None = None,
    shape: BatchShape | None = None,
    scratch: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """`reference` of `ops/paged_attention.py` over a `RowLayout`; q may be a view with any token and head stride.

    shape: what is known of the batch; without it the device is asked, which waits for it. scratch: float32, at least
    `scratch_shape`, for the parts of split requests; its content means nothing before and after. Ids and lengths are
    not checked: the device has nobody to tell. Rows of no request are left as they are; `shared` saves nothing here.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_reqs = len(seq_lens)
    require("q", q, q.dtype, (num_tokens, num_heads, layout.head_dim), dense=1)
    require("kv_cache", kv_cache, torch.uint8, layout.shape(len(kv_cache)))
    require("block_table", block_table, torch.int32, block_table.shape, dense=1)
    require("seq_lens", seq_lens, torch.int32, (num_reqs,))
    require("query_start_loc", query_start_loc, torch.int32, (num_reqs + 1,))
    for name, per_head in (("sinks", options.sinks), ("alibi_slopes", options.alibi_slopes)):
        if per_head is not None:
            require(name, per_head, torch.float32, (num_heads,))
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    require("out", out, q.dtype, q.shape)
    if not num_tokens or not num_reqs:
        return out
    if shape is None:
        shape = BatchShape(int(query_start_loc.diff().max()), int(seq_lens.max()))
    group = num_heads // layout.num_kv_heads
    dot_dtype = _dot_dtype(q.dtype, layout)
    is_decode, elements = shape.max_query_len == 1, kv_cache.view(_ELEMENTS[layout.dtype])
    is_fetched = not is_decode and not batch_invariant and _can_fetch(elements, layout, q)
    tiles = choose_tiles(
        head_dim, group, dot_dtype, shape.max_query_len, batch_invariant=batch_invariant, is_fetched=is_fetched
    )
    kv_tiles = None
    if is_fetched:
        kv_tiles = TensorDescriptor.from_tensor(elements.view(-1, head_dim), [tiles.keys, head_dim])
    tokens = tiles.rows // group
    split_len = min(shape.max_split_query_len, tokens)
    max_segments = triton.cdiv(shape.max_seq_len, SEGMENT)
    part_acc, part_top = _parts(scratch, num_reqs, max_segments, split_len, num_heads, head_dim, q.device)
    is_int8, is_fp8 = layout.dtype == "int8", layout.dtype == "fp8_e4m3"
    scales = kv_cache.flatten(3).view(torch.float32)[..., -layout.block_size :] if is_int8 else None
    block_dim = max(16, triton.next_power_of_2(head_dim))
    num_tiles = num_reqs if is_decode else num_tokens // tokens + num_reqs
    num_parts = choose_num_parts(num_reqs * layout.num_kv_heads, max_segments) if is_decode else max_segments
    _attend_kernel[(num_tiles, layout.num_kv_heads, num_parts)](
        out, q, elements, kv_tiles, scales, block_table, seq_lens, query_start_loc, part_acc, part_top,
        options.sinks, options.alibi_slopes, num_reqs, max_segments,
        options.scale * (options.k_scale if is_fp8 else 1.0), options.softcap, options.v_scale if is_fp8 else 1.0,
        out.stride(0), q.stride(0), q.stride(1), block_table.stride(0),
        *elements.stride()[:3], *(scales.stride()[:3] if is_int8 else (0, 0, 0)),
        NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_DIM=block_dim, BLOCK_SIZE=layout.block_size,
        ROWS=tiles.rows, TILE=tiles.keys, SEGMENT=SEGMENT, SPLIT_LEN=split_len, WINDOW=options.sliding_window or 0,
        HAS_SOFTCAP=options.softcap > 0, HAS_SINKS=options.sinks is not None,
        HAS_ALIBI=options.alibi_slopes is not None, IS_INT8=is_int8, IS_INVARIANT=batch_invariant, IS_DECODE=is_decode,
        DOT_DTYPE=_TRITON_DTYPES[dot_dtype], num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        enable_fp_fusion=not batch_invariant,
    )  # fmt: skip
    if max_segments > 1:
        _merge_kernel[(num_reqs, split_len, num_heads)](
            out, part_acc, part_top, seq_lens, query_start_loc, options.sinks, max_segments,
            options.v_scale if is_fp8 else 1.0, out.stride(0),
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_DIM=block_dim, SEGMENT=SEGMENT, SPLIT_LEN=split_len,
            WINDOW=options.sliding_window or 0, HAS_SINKS=options.sinks is not None, AT_ONCE=_MERGED_AT_ONCE,
            num_warps=1, enable_fp_fusion=not batch_invariant,
        )  # fmt: skip
    return out


def _can_fetch(elements: torch.Tensor, layout: RowLayout, q: torch.Tensor) -> bool:
    """Whether the card's copy engine can fetch a tile of keys by one address, from the cache as rows of head_dim: where
    a tile lies in one block and is stored as it is multiplied. It saves the programs the addresses of each row."""
    if TensorDescriptor is None:
        return False
    if layout.head_dim not in _TILES["fetched"] or elements.dtype != q.dtype or q.dtype == torch.float32:
        return False
    if layout.block_size % _TILES["fetched"][layout.head_dim].keys:
        return False
    return not q.is_cuda or torch.cuda.get_device_capability(q.device) >= (9, 0)


_ELEMENTS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def _dot_dtype(dtype: torch.dtype, layout: RowLayout) -> torch.dtype:
    """What is multiplied: the queries' dtype where it holds what the cache stores exactly, else float32."""
    stored = _ELEMENTS[layout.dtype]
    return dtype if stored in (dtype, torch.float8_e4m3fn, torch.int8) else torch.float32


def _parts(
    scratch: torch.Tensor | None,
    num_reqs: int,
    max_segments: int,
    split_len: int,
    num_heads: int,
    head_dim: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places for the sums, and for maximum and total, of the parts of split requests."""
    num_parts = num_reqs * max_segments * split_len * num_heads if max_segments > 1 else 0
    if scratch is None:
        scratch = torch.empty(num_parts * (head_dim + 2), dtype=torch.float32, device=device)
    if scratch.numel() < num_parts * (head_dim + 2):
        raise ValueError(f"scratch holds {scratch.numel()} numbers; {num_parts * (head_dim + 2)} are needed")
    sums, rest = scratch.flatten()[: num_parts * (head_dim + 2)].split([num_parts * head_dim, num_parts * 2])
    return sums, rest
