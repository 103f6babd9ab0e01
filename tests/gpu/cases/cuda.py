"""The CUDA C++ kernels, where they are built. For a card alone: tests/cuda proves their arithmetic without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from minivllm.ops import cuda
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.paged_attention import Options, _attend
from tests.gpu.case import DTYPES, Case, Check, ints, randn
from tests.gpu.cases.attention import BATCHES, LARGE, NAMES, TOLERANCE, filled_cache, some_options
from tests.gpu.cases.sampling import odd_truncation, truncation


def why_not() -> str | None:
    """Why these cannot be checked."""
    return cuda.extension()[1]


def decode(
    device: str,
    large: bool,
    *,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    head_dim: int = 128,
    group: int = 4,
    block_size: int = 64,
    option: str = "plain",
) -> Check:
    kv_heads = 8 if large else 2
    heads, torch_dtype = group * kv_heads, DTYPES[dtype]
    requests = (LARGE if large else BATCHES)["decode"]
    layout = RowLayout(kv_dtype or NAMES[torch_dtype], kv_heads, head_dim, block_size)
    scales = {"k_scale": 0.75, "v_scale": 1.5} if kv_dtype == "fp8_e4m3" else {}
    chosen = {**some_options(heads, device)[option], "alibi_slopes": None}
    options = Options(scale=head_dim**-0.5, **scales, **chosen)
    cache, table = filled_cache(requests, layout, torch_dtype, options, device)
    seq_lens = ints(device, *(seq_len for seq_len, _ in requests))
    q = randn(device, len(requests), heads + 3, head_dim, dtype=torch_dtype)[:, :heads]
    longest = max(seq_len for seq_len, _ in requests)

    def run() -> torch.Tensor:
        return cuda.decode_attention(
            q, cache, table, seq_lens, layout=layout, options=options, max_seq_len=longest
        )

    def expected() -> torch.Tensor:
        rows = []
        for b, (seq_len, _) in enumerate(requests):
            pages = cache[table[b, : -(-seq_len // block_size)].long()]
            k, v = (
                layout.read(pages, half, scale).transpose(0, 1).flatten(1, 2)[:, :seq_len].double()
                for half, scale in enumerate((options.k_scale, options.v_scale))
            )
            rows.append(_attend(q[b : b + 1].double(), k, v, options))
        return torch.cat(rows)

    return Check(run, expected, TOLERANCE[torch_dtype] + 8e-3 * (kv_dtype is not None))


def captured(device: str, large: bool, *, kv_dtype: str) -> Check:
    """A decode captured in a graph for far longer requests than come, some rows of none; the bits of one launched for
    its lengths, with a thread block for each segment. (A CPU captures nothing: there it is launched as it would be.)"""
    kv_heads, head_dim, block_size, bound = 8 if large else 2, 128, 64, 32768
    lengths = (512, 1, 8192, 3000, 1025, 1024, 7000, 64) * 8 if large else (70, 1, 1100)
    layout, options = RowLayout(kv_dtype, kv_heads, head_dim, block_size), Options(scale=head_dim**-0.5)
    cache, table = filled_cache([(n, 1) for n in lengths], layout, torch.bfloat16, options, device)
    q = randn(device, len(lengths) + 2, 4 * kv_heads, head_dim, dtype=torch.bfloat16)
    table = torch.cat([table, torch.full_like(table[:2], -1)])  # where nobody may look
    seq_lens = torch.ones(len(q), dtype=torch.int32, device=device)

    def launch(out: torch.Tensor, longest: int, num_parts: int | None = None) -> torch.Tensor:
        return cuda.decode_attention(
            q, cache, table, seq_lens, layout=layout, options=options, max_seq_len=longest, num_parts=num_parts, out=out
        )  # fmt: skip

    def run() -> torch.Tensor:
        out, work = torch.zeros_like(q), lambda: launch(out, bound)
        seq_lens[: len(lengths)] = ints(device, *(n // 3 for n in lengths))  # no more than a table knows
        seq_lens[len(lengths) :] = 0
        if device == "cuda":
            work()  # no module may be loaded in a capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            work = graph.replay
        out.zero_()
        seq_lens[: len(lengths)] = ints(device, *lengths)
        work()
        return out

    def expected() -> torch.Tensor:
        return launch(torch.zeros_like(q), max(lengths), -(-max(lengths) // cuda.SEGMENT))

    return Check(run, expected, 0.0)


def copies(device: str, large: bool, *, to_host: bool) -> Check:
    """Blocks of two layers to pinned memory and back, or within the device."""
    shape = (2, 300 if large else 7, 65536 if large else 48)
    bits = torch.randint(0, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pairs = [(0, 6), (3, 1), (4, 2)]

    def expected() -> torch.Tensor:
        result = bits.clone()
        for source, target in pairs:
            result[:, target] = bits[:, source]
        return result

    def run() -> torch.Tensor:
        layers = bits.to(device)
        if to_host:
            host = torch.zeros(shape, dtype=torch.uint8).pin_memory()
            stream = torch.cuda.current_stream().cuda_stream
            for layer, place in zip(layers, host):
                cuda.copy_ranges(
                    cuda.block_ranges(layer, place, [(source, source) for source, _ in pairs]), stream
                )
            for layer, place in zip(layers, host):
                cuda.copy_ranges(cuda.block_ranges(place, layer, pairs), stream)
        else:
            places = torch.tensor([layer.data_ptr() for layer in layers], device=device)
            cuda.copy_blocks(places, places, torch.tensor(pairs, device=device), shape[2])
        torch.cuda.synchronize()
        return layers.cpu()

    return Check(run, expected, 0.0)


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}

    def add(make: Callable[..., Check], **chosen) -> None:
        name = "_".join(
            f"{key}-{value}" if isinstance(value, (int, bool)) else value for key, value in chosen.items()
        )
        found[f"cuda_{make.__name__}_{name}"] = partial(make, **chosen)

    for dtype in ("bf16", "f16"):
        for head_dim, group in ((64, 4), (64, 12), (128, 1), (128, 4), (128, 8), (128, 16), (256, 2)):
            add(decode, dtype=dtype, head_dim=head_dim, group=group)
    for kv_dtype in ("fp8_e4m3", "int8"):
        for head_dim, group in ((128, 4), (128, 12), (256, 2)):
            add(decode, kv_dtype=kv_dtype, head_dim=head_dim, group=group)
    for option in ("window", "window_1100", "softcap", "sinks", "all"):
        add(decode, option=option)
    add(decode, block_size=16)
    for kv_dtype in ("bfloat16", "fp8_e4m3", "int8"):
        add(captured, kv_dtype=kv_dtype)
    for vocab_size in (130, 9001):
        for make in (truncation, odd_truncation):
            found[f"cuda_{make.__name__}_{vocab_size}"] = partial(
                make, vocab_size=vocab_size, truncate=cuda.top_k_top_p_min_p
            )
    for to_host in (False, True):
        add(copies, to_host=to_host)
    return found


CASES = _cases()
