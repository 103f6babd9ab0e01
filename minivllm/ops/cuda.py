"""The ops' door to the CUDA C++ kernels of csrc/cuda, which an installation may lack: Triton's serve everything.

A backend calls one where `benchmarks/gpu` found it faster than Triton's on a card, with a line in benchmarks/LOG.md
each: `attention/backends/triton.py` calls decode attention, `ops/linear_few_rows.py` products of few rows, the sampler
truncation. Blocks are copied by tests alone yet.

The only module that imports `minivllm._cuda`, and only when it is asked for: no CPU pays for it. Functions launch on
the current stream and return before the work is done; every launch that fails raises RuntimeError.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from minivllm.ops import gpu
from minivllm.ops.checks import require
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.op import OpSpec
from minivllm.ops.paged_attention import Options

SEGMENT = 1024  # absolute positions, as in csrc/cuda/decode_attention.h
_HEAD_DIMS = {"float16": (64, 128, 256), "bfloat16": (64, 128, 256), "fp8_e4m3": (128, 256), "int8": (128, 256)}
_KV_CODES = {"fp8_e4m3": 1, "int8": 2}  # csrc/cuda/decode_attention_sizes.h
_BLOCK_TILE = 16  # keys a warp takes at once, all of one block
_LARGE_SHARED_BYTES = 128 << 10  # of a thread block: head_dim 256 in 16 bits; all else fits into any card's 99 KiB
_MOST_LOOPED = 128  # head_dim, up to which a thread block may take several segments
_FEW_PARTS, _MOST_BLOCKS = 2, 4096
MOST_FEW_ROWS = 16  # as in csrc/cuda/few_rows_sizes.h
_WEIGHT_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}
_CHUNK_BYTES = 16
_MOST_TOKENS = 1 << 19  # csrc/cuda/truncation_sizes.h
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@functools.cache
def extension() -> tuple[ModuleType | None, str | None]:
    """The module, or None; and why not."""
    try:
        from minivllm import _cuda
    except ImportError as error:
        return None, f"built without CUDA kernels (see docs/gpu.md): {error}"
    return _cuda, None


def decode_why_not(dtype: torch.dtype, layout: RowLayout, group: int) -> str | None:
    """Why `decode_attention` cannot serve queries of this dtype over this cache; group: heads of one KV head."""
    if (missing := extension()[1]) is not None:
        return missing
    if dtype not in _NAMES:
        return f"no {dtype} kernel"
    if layout.dtype not in (_NAMES[dtype], *_KV_CODES):
        return f"no kernel for {dtype} over a cache in {layout.dtype}"
    if layout.head_dim not in _HEAD_DIMS[layout.dtype]:
        return f"head_dim {layout.head_dim} over {layout.dtype} is none of {_HEAD_DIMS[layout.dtype]}"
    most = 8 if layout.head_dim == 256 else 16
    if group > most:
        return f"{group} heads share a KV head, the kernel takes {most}"
    if layout.block_size % _BLOCK_TILE:
        return f"block size {layout.block_size} is not a multiple of {_BLOCK_TILE}"
    if layout.head_dim == 256 and layout.dtype not in _KV_CODES and shared_bytes_of_card() < _LARGE_SHARED_BYTES:
        return f"head_dim 256 over {layout.dtype} needs {_LARGE_SHARED_BYTES >> 10} KiB of shared memory"
    return None


def shared_bytes_of_card() -> int:
    """Shared memory that a thread block may have: 99 KiB at compute capability 8.6, 8.9 and 12.0, elsewhere more."""
    card = torch.cuda.get_device_properties("cuda")
    return getattr(card, "shared_memory_per_block_optin", 99 << 10)  # an older torch does not say


def choose_num_parts(num_tiles: int, max_segments: int, head_dim: int, window: int = 0) -> int:
    """How many thread blocks share the segments of a request and KV head; num_tiles: requests times KV heads.

    A captured decode is launched for --max-model-len, and a block that finds no segment has still waited for a place: a
    Hopper card has some 264 of them, by shared memory, which are full of blocks that read. No fewer than 2 a tile, so
    that the blocks of a large batch stay small beside the whole. On an H100 within 2 % of the best number at every size
    measured, but one request of 512 tokens (benchmarks/LOG.md). No choice changes a bit.
    """
    seen = max_segments if window <= 0 else min(max_segments, (window - 2) // SEGMENT + 2)
    if head_dim > _MOST_LOOPED:
        return max_segments
    return max(1, min(seen, max(_FEW_PARTS, _MOST_BLOCKS // max(1, num_tiles))))


def scratch_numel(num_reqs: int, max_seq_len: int, num_heads: int, head_dim: int) -> int:
    """Numbers of the float32 scratch for requests up to max_seq_len."""
    max_segments = -(-max_seq_len // SEGMENT)
    return 0 if max_segments <= 1 else num_reqs * max_segments * num_heads * (head_dim + 2)


def decode_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layout: RowLayout,
    options: Options,
    max_seq_len: int,
    num_parts: int | None = None,
    scratch: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference` of `ops/paged_attention.py` for one query row a request: row i is request i's last position.

    q: [num_reqs, num_heads, head_dim], any strides of whole 16 bytes; max_seq_len: none is longer; num_parts: by
    `choose_num_parts` if not given; scratch: float32, `scratch_numel` of it. A row whose seq_len is 0 stays as it is.
    Ids and lengths are not checked. A row's bits depend on its own query, keys and values alone, but they are not those
    of the Triton kernels.
    """
    num_reqs, num_heads, head_dim = q.shape
    if options.alibi_slopes is not None:
        raise ValueError("decode_attention has no ALiBi; use the Triton kernel")
    require("q", q, q.dtype, (num_reqs, num_heads, layout.head_dim), dense=1)
    if q.data_ptr() % 16 or any(stride * q.itemsize % 16 for stride in q.stride()[:2]):
        raise ValueError(f"q of strides {q.stride()} at {q.data_ptr():#x} is not aligned to 16 bytes")
    require("kv_cache", kv_cache, torch.uint8, layout.shape(len(kv_cache)))
    require("block_table", block_table, torch.int32, block_table.shape, dense=1)
    require("seq_lens", seq_lens, torch.int32, (num_reqs,))
    if options.sinks is not None:
        require("sinks", options.sinks, torch.float32, (num_heads,))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    require("out", out, q.dtype, q.shape)
    needed = scratch_numel(num_reqs, max_seq_len, num_heads, head_dim)
    if scratch is None:
        scratch = torch.empty(needed, dtype=torch.float32, device=q.device)
    if scratch.numel() < needed:
        raise ValueError(f"scratch holds {scratch.numel()} numbers; {needed} are needed")
    max_segments, window = -(-max_seq_len // SEGMENT), options.sliding_window or 0
    if num_parts is None:
        num_parts = choose_num_parts(num_reqs * layout.num_kv_heads, max_segments, head_dim, window)
    sums = scratch.data_ptr()
    tops = sums + needed // (head_dim + 2) * head_dim * 4
    is_fp8 = layout.dtype == "fp8_e4m3"
    extension()[0].decode_attention(
        out.data_ptr(), q.data_ptr(), kv_cache.data_ptr(), (block_table.data_ptr(), seq_lens.data_ptr()), (sums, tops),
        0 if options.sinks is None else options.sinks.data_ptr(),
        (num_reqs, num_heads, layout.num_kv_heads, head_dim, layout.block_size, max_segments, window,
         num_parts),
        q.dtype == torch.bfloat16, _KV_CODES.get(layout.dtype, 0),
        (*q.stride()[:2], out.stride(0), block_table.stride(0)), kv_cache.stride()[:3],
        (options.scale * (options.k_scale if is_fp8 else 1.0), options.softcap, options.v_scale if is_fp8 else 1.0),
        torch.cuda.current_stream(q.device).cuda_stream,
    )  # fmt: skip
    return out


def few_rows_why_not(spec: OpSpec) -> str | None:
    """Why `few_rows` cannot serve linear layers of this spec, whose weights are of its dtype or 8-bit numbers."""
    if spec.device != "cuda":
        return f"needs CUDA, got {spec.device}"
    if (missing := extension()[1]) is not None:
        return missing
    if spec.dtype not in _NAMES:
        return f"no {spec.dtype} kernel"
    if spec.sizes.get("in_features", 0) % _CHUNK_BYTES:
        return f"{spec.sizes['in_features']} input features are not a multiple of {_CHUNK_BYTES}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "needs compute capability 9.0"
    return None


def few_rows_fits(
    out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor | None
) -> bool:
    """Whether `few_rows` takes these, x and bias of one 16-bit dtype: else another kernel must."""
    is_aligned = x.stride(1) == 1 and x.data_ptr() % _CHUNK_BYTES == 0 and x.stride(0) * x.itemsize % _CHUNK_BYTES == 0
    is_dense = out.stride(1) == 1 and (addend is None or addend.stride(1) == 1)
    is_known = out.dtype in (x.dtype, torch.float32) and (bias is None or bias.dtype == x.dtype)
    return 0 < len(x) <= MOST_FEW_ROWS and is_aligned and is_dense and is_known


def few_rows(
    epilogue: int,
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    x_scales: torch.Tensor | None = None,
    weight_scales: torch.Tensor | None = None,
    *,
    is_bf16: bool,
) -> torch.Tensor:
    """`DenseLinear`'s calls for up to `MOST_FEW_ROWS` rows, what `few_rows_fits`: a row's bits depend on no other.

    epilogue: 0 stores, 1 adds to `out`, which has 16 bits then, 2 is silu_mul; out: [M, N]; x: [M, K]; weight: [N, K],
    or [2N, K] for silu_mul; is_bf16: the type of bias and activations, else float16. The weight may be read before what
    was launched just before is done: that must not have written it.
    """
    tensors = (out, x, weight, bias, addend, x_scales, weight_scales)
    size = x.itemsize
    extension()[0].few_rows(
        [0 if each is None else each.data_ptr() for each in tensors], (len(x), out.shape[1], x.shape[1] * size),
        (x.stride(0) * size, weight.stride(0) * size, out.stride(0), 0 if addend is None else addend.stride(0)),
        _WEIGHT_CODES[weight.dtype], epilogue, is_bf16, out.dtype == torch.float32,
        torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    return out


def truncation_why_not(spec: OpSpec) -> str | None:
    """Why `top_k_top_p_min_p` cannot serve a spec."""
    if (reason := gpu.float32_why_not(spec)) is not None:
        return reason
    if spec.sizes.get("vocab_size", 0) > _MOST_TOKENS:
        return f"the kernel takes {_MOST_TOKENS} logits"
    return extension()[1]


def top_k_top_p_min_p(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """`top_k_top_p_min_p_reference` of `ops/sampling.py`, by selection instead of a sort. Any row stride.

    Keeps the same set, unless the cumulated probability lies within about 1e-7 of p. Rows that ask for nothing cost
    nothing.
    """
    num_rows, vocab_size = logits.shape
    require("logits", logits, torch.float32, logits.shape, dense=1)
    require("top_k", top_k, torch.int32, (num_rows,))
    require("top_p", top_p, torch.float32, (num_rows,))
    require("min_p", min_p, torch.float32, (num_rows,))
    extension()[0].truncate(
        logits.data_ptr(), top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(), logits.stride(0), vocab_size, num_rows,
        torch.cuda.current_stream(logits.device).cuda_stream,
    )  # fmt: skip


def copy_blocks(sources: torch.Tensor, targets: torch.Tensor, pairs: torch.Tensor, block_bytes: int) -> None:
    """targets[i][pairs[j, 1]] = sources[i][pairs[j, 0]] for every layer i and pair j; no block in both columns.

    sources, targets: [num_layers] int64, addresses of the layers' caches, which lie on the device or in pinned host
    memory; pairs: [n, 2] int64 block ids. All three tensors are on the device.
    """
    require("sources", sources, torch.int64, targets.shape)
    require("targets", targets, torch.int64, targets.shape)
    require("pairs", pairs, torch.int64, (len(pairs), 2))
    extension()[0].copy_blocks(
        sources.data_ptr(), targets.data_ptr(), len(targets), pairs.data_ptr(), len(pairs), block_bytes,
        torch.cuda.current_stream(pairs.device).cuda_stream,
    )  # fmt: skip


def copy_ranges(ranges: list[tuple[int, int, int]], stream: int) -> None:
    """Copy (from, to, bytes) each, addresses on the device or in pinned host memory, by the copy engines. stream: its
    handle; the memory must stay as it is until the stream has come so far."""
    extension()[0].copy_ranges([list(each) for each in ranges], stream)


def block_ranges(
    source: torch.Tensor, target: torch.Tensor, pairs: list[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """`copy_ranges`' argument for blocks of one layer: those that follow one another on both sides become one range.

    source, target: one layer's cache each, [num_blocks, …], a block's bytes contiguous.
    """
    size = source.stride(0) * source.itemsize
    ranges: list[tuple[int, int, int]] = []
    for its, ours in pairs:
        start, end = source.data_ptr() + its * size, target.data_ptr() + ours * size
        if ranges and ranges[-1][0] + ranges[-1][2] == start and ranges[-1][1] + ranges[-1][2] == end:
            ranges[-1] = (*ranges[-1][:2], ranges[-1][2] + size)
        else:
            ranges.append((start, end, size))
    return ranges
