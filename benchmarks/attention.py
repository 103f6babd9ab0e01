"""Paged attention on this CPU: bytes a second of decode, operations a second of prefill, beside the machine and torch.

    python benchmarks/attention.py [--kv-cache-dtype int8] [--heads 16 --kv-heads 8 --head-dim 128]

Decode walks over as many layers' caches as fill --gib, so that nothing is read from a processor's cache. A tile
that several requests share counts once. Shares are of what roofline.py measures before and after: reading memory, and
tile products alone. Beside each: torch's scaled_dot_product_attention of the same queries over dense keys and values
(in bfloat16 for any cache type; requests of different lengths all as long as the mean), in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from roofline import bandwidth, peak_products
from torch.nn.functional import scaled_dot_product_attention

from minivllm.attention.backend import AttentionSpec, StepInputs
from minivllm.attention.backends.cpu_native import CpuNativeBackend
from minivllm.ops import native
from minivllm.ops.paged_attention import Options

BLOCK_SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--gib", type=float, default=1.0, help="KV cache that a measurement of decode walks over"
    )
    args = parser.parse_args()
    spec = AttentionSpec(
        args.heads,
        args.kv_heads,
        args.head_dim,
        BLOCK_SIZE,
        getattr(torch, args.dtype),
        "cpu",
        args.kv_cache_dtype,
    )
    backend = CpuNativeBackend(spec)
    torch.set_num_threads(native.lib.num_threads())
    print(
        f"{native.lib.isa()}, {native.lib.num_threads()} threads; {args.dtype}, cache {backend.layout_id}, "
        f"{args.heads}/{args.kv_heads} heads of {args.head_dim}"
    )
    reads, peaks = [bandwidth(0.3)], [peak_products("bfloat16", 0.2)]
    spread = [256 + 256 * i // 63 for i in range(64)]
    decodes = {
        "decode 64 × 256…512": decode(backend, spread, 0, args.gib),
        "decode 1 × 4096": decode(backend, [4096], 0, args.gib),
        "decode 32 × (1024 shared + 64)": decode(backend, [1088] * 32, 1024, args.gib),
        "decode 32 × 1088, nothing shared": decode(backend, [1088] * 32, 0, args.gib),
    }
    prefills = {num_tokens: prefill(backend, num_tokens) for num_tokens in (512, 2048, 4096)}
    reads.append(bandwidth(0.3))
    peaks.append(peak_products("bfloat16", 0.2))
    read, peak = max(reads), max(peaks)
    print(f"read {reads[0]:.1f}, {reads[1]:.1f} GB/s; tile products {peaks[0]:.2f}, {peaks[1]:.2f} TFLOP/s")
    for name, (seconds, torch_seconds, num_bytes) in decodes.items():
        rate = num_bytes / seconds / 1e9
        print(
            f"{name:34} {seconds * 1e6:8.0f} µs a layer {rate:6.1f} GB/s  {rate / read:4.0%} of reading; "
            f"torch {torch_seconds * 1e6:8.0f} µs, {torch_seconds / seconds:.2f} times ours"
        )
    for num_tokens, (seconds, torch_seconds) in prefills.items():
        flops = 2 * num_tokens * num_tokens * args.heads * args.head_dim  # causal: half of 4
        rate = flops / seconds / 1e12
        share = f"{rate / peak:4.0%} of tile products" if peak else "no tile products here"
        print(
            f"{f'prefill {num_tokens}':34} {seconds * 1e3:8.2f} ms a layer {rate:6.3f} TFLOP/s  {share}; "
            f"torch {torch_seconds * 1e3:8.2f} ms, {torch_seconds / seconds:.2f} times ours"
        )


def decode(
    backend: CpuNativeBackend, seq_lens: list[int], num_shared: int, gib: float, *, with_torch: bool = True
) -> tuple[float, float, int]:
    """Seconds a layer, torch's, and the bytes it has to read."""
    spec, layout = backend.spec, backend.layout
    tables, num_blocks = [], num_shared // BLOCK_SIZE
    for seq_len in seq_lens:
        own = range(num_blocks, num_blocks + -(-(seq_len - num_shared) // BLOCK_SIZE))
        tables.append([*range(num_shared // BLOCK_SIZE), *own])
        num_blocks = own.stop
    width = max(map(len, tables))
    step = StepInputs(
        query_start_loc=torch.arange(len(seq_lens) + 1, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
        slot_mapping=torch.tensor(
            [t[(n - 1) // BLOCK_SIZE] * BLOCK_SIZE + (n - 1) % BLOCK_SIZE for t, n in zip(tables, seq_lens)]
        ),
    )
    num_layers = max(2, int(gib * 2**30 / (num_blocks * layout.block_bytes)))
    caches = [filled(backend, num_blocks) for _ in range(num_layers)]
    q, k, v = new_rows(spec, len(seq_lens))
    metadata, options = backend.build_metadata(step), Options(spec.head_dim**-0.5)

    def all_layers() -> None:
        for cache in caches:
            backend.forward(q, k, v, cache, metadata, options=options)

    num_tokens = sum(seq_lens) - num_shared * (len(seq_lens) - 1)
    theirs, num_theirs = torch_decode(spec, seq_lens, gib) if with_torch else (None, 1)
    ours, theirs_s = in_turns(3, all_layers, theirs)
    return ours / num_layers, theirs_s / num_theirs, num_tokens * layout.block_bytes // BLOCK_SIZE


def torch_decode(spec: AttentionSpec, seq_lens: list[int], gib: float) -> tuple[Callable[[], object], int]:
    """One call over so many layers."""
    num, length = len(seq_lens), sum(seq_lens) // len(seq_lens)
    shape = (num, spec.num_kv_heads, length, spec.head_dim)
    num_layers = max(2, int(gib * 2**30 / (2 * torch.Size(shape).numel() * spec.dtype.itemsize)))
    layers = [[torch.randn(shape).to(spec.dtype) for _ in range(2)] for _ in range(num_layers)]
    q = torch.randn(num, spec.num_heads, 1, spec.head_dim).to(spec.dtype)

    def run() -> None:
        for k, v in layers:
            scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run, num_layers


def prefill(
    backend: CpuNativeBackend, num_tokens: int, *, with_torch: bool = True
) -> tuple[float, float]:
    """Seconds a layer, and torch's."""
    spec, num_blocks = backend.spec, -(-num_tokens // BLOCK_SIZE)
    step = StepInputs(
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        block_table=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
        slot_mapping=torch.arange(num_tokens),
    )
    cache, (q, k, v) = filled(backend, num_blocks), new_rows(spec, num_tokens)
    metadata, options = backend.build_metadata(step), Options(spec.head_dim**-0.5)
    dense = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    return in_turns(
        5,
        lambda: backend.forward(q, k, v, cache, metadata, options=options),
        (lambda: scaled_dot_product_attention(*dense, is_causal=True, enable_gqa=True)) if with_torch else None,
    )


def filled(backend: CpuNativeBackend, num_blocks: int) -> torch.Tensor:
    cache = backend.new_kv_cache(num_blocks)
    cache.view(torch.int32).random_(0x30003000, 0x30003FFF)  # small numbers in every type
    return cache


def new_rows(spec: AttentionSpec, num_tokens: int) -> tuple[torch.Tensor, ...]:
    heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    return torch.randn(num_tokens, sum(heads), spec.head_dim).to(spec.dtype).split(heads, 1)


def in_turns(
    repeats: int, ours: Callable[[], object], theirs: Callable[[], object] | None
) -> tuple[float, float]:
    """Seconds of each one's fastest run, one before not counted; infinite for nobody."""
    best = [float("inf"), float("inf")]
    for repeat in range(repeats + 1):
        for i, run in enumerate((ours, theirs)):
            if run is None:
                continue
            time.sleep(0.02)  # torch's threads spin for a while after their work
            begin = time.perf_counter()
            run()
            if repeat:
                best[i] = min(best[i], time.perf_counter() - begin)
    return best[0], best[1]


if __name__ == "__main__":
    with torch.inference_mode():
        main()
