"""Paged attention on this CPU: bytes a second of decode, operations a second of prefill, beside what the machine gives.

    python benchmarks/attention.py [--kv-cache-dtype int8] [--heads 16 --kv-heads 8 --head-dim 128]

Decode walks over as many layers' caches as fill --gib, so that nothing is read from a processor's cache. A tile
that several requests share counts once. Bandwidth: a sum over a large array by all threads, before and after.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from minivllm.attention.backend import AttentionSpec, StepInputs
from minivllm.attention.backends.cpu_native import CpuNativeBackend
from minivllm.ops import native
from minivllm.ops.linear import PackedLinear
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
    print(
        f"{native.lib.isa()}, {native.lib.num_threads()} threads; {args.dtype}, cache {backend.layout_id}, "
        f"{args.heads}/{args.kv_heads} heads of {args.head_dim}"
    )
    reads = [read_bandwidth(backend)]
    spread = [256 + 256 * i // 63 for i in range(64)]
    decodes = {
        "decode 64 × 256…512": decode(backend, spread, 0, args.gib),
        "decode 1 × 4096": decode(backend, [4096], 0, args.gib),
        "decode 32 × (1024 shared + 64)": decode(backend, [1088] * 32, 1024, args.gib),
        "decode 32 × 1088, nothing shared": decode(backend, [1088] * 32, 0, args.gib),
    }
    reads.append(read_bandwidth(backend))
    peak = max(reads)
    print(f"read bandwidth {reads[0]:.1f}, {reads[1]:.1f} GB/s")
    for name, (seconds, num_bytes) in decodes.items():
        rate = num_bytes / seconds / 1e9
        print(f"{name:34} {seconds * 1e6:8.0f} µs a layer {rate:6.1f} GB/s  {rate / peak:4.0%} of bandwidth")
    gemm = gemm_rate(spec.dtype)
    for num_tokens in (512, 4096):
        seconds = prefill(backend, num_tokens)
        flops = 2 * num_tokens * num_tokens * args.heads * args.head_dim  # causal: half of 4
        rate = flops / seconds / 1e12
        print(
            f"{f'prefill {num_tokens}':34} {seconds * 1e3:8.2f} ms a layer {rate:6.3f} TFLOP/s  {rate / gemm:4.0%} of "
            f"a linear layer's {gemm:.2f}"
        )


def read_bandwidth(backend: CpuNativeBackend) -> float:
    """GB/s of a sum over memory of the cache's kind."""
    words = filled(backend, 2**30 // backend.block_bytes).view(-1).view(torch.int64)
    threads = torch.get_num_threads()
    torch.set_num_threads(native.lib.num_threads())
    seconds = best_of(3, words.sum)
    torch.set_num_threads(threads)
    return words.nbytes / seconds / 1e9


def gemm_rate(dtype: torch.dtype) -> float:
    """TFLOP/s of a linear layer of 2048 × 2048 at 2048 rows."""
    n = 2048
    weight, x = PackedLinear(n, n, dtype), torch.randn(n, n).to(dtype)
    weight.load_rows(0, torch.randn(n, n).to(dtype))
    return 2 * n**3 / best_of(5, lambda: weight(x)) / 1e12


def decode(backend: CpuNativeBackend, seq_lens: list[int], num_shared: int, gib: float) -> tuple[float, int]:
    """Seconds a layer, and the bytes it has to read."""
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
    return best_of(3, all_layers) / num_layers, num_tokens * layout.block_bytes // BLOCK_SIZE


def prefill(backend: CpuNativeBackend, num_tokens: int) -> float:
    """Seconds a layer."""
    spec, num_blocks = backend.spec, -(-num_tokens // BLOCK_SIZE)
    step = StepInputs(
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        block_table=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
        slot_mapping=torch.arange(num_tokens),
    )
    cache, (q, k, v) = filled(backend, num_blocks), new_rows(spec, num_tokens)
    metadata, options = backend.build_metadata(step), Options(spec.head_dim**-0.5)
    return best_of(5, lambda: backend.forward(q, k, v, cache, metadata, options=options))


def filled(backend: CpuNativeBackend, num_blocks: int) -> torch.Tensor:
    cache = backend.new_kv_cache(num_blocks)
    cache.view(torch.int32).random_(0x30003000, 0x30003FFF)  # small numbers in every type
    return cache


def new_rows(spec: AttentionSpec, num_tokens: int) -> tuple[torch.Tensor, ...]:
    heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    return torch.randn(num_tokens, sum(heads), spec.head_dim).to(spec.dtype).split(heads, 1)


def best_of(repeats: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest run, one run before not counted."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


if __name__ == "__main__":
    main()
