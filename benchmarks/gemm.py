"""Linear layers against the machine: TFLOP/s and GB/s of weights at several numbers of rows, ours beside oneDNN.

    python benchmarks/gemm.py [--model qwen3-0.6b | llama-3.2-1b] [--rows 1,16,64,…] [--threads N] [--no-onednn]

Each shape has so many copies of its weight that none is found in a cache, as in a model. oneDNN is called with its
weight packed for that number of rows. Best of several runs, ours and oneDNN's in turns; the read bandwidth (a sum over
1 GiB on huge pages, by torch) is measured before and after.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from minivllm.ops import native
from minivllm.ops.linear import PackedLinear

# in_features, out_features
SHAPES = {
    "qwen3-0.6b": {
        "qkv": (1024, 4096), "o": (2048, 1024), "gate_up": (1024, 6144), "down": (3072, 1024),
        "vocabulary": (1024, 151936),
    },
    "llama-3.2-1b": {
        "qkv": (2048, 3072), "o": (2048, 2048), "gate_up": (2048, 16384), "down": (8192, 2048),
        "vocabulary": (2048, 128256),
    },
}  # fmt: skip
COLD_BYTES = 512 << 20  # of weights, read in turn


def read_bandwidth() -> float:
    """GB/s of a sum over 1 GiB."""
    buffer = native.huge_pages(1 << 30).view(torch.int64)
    buffer.zero_()
    return best(lambda: buffer.sum(), repeat=4, work=buffer.nbytes) / 1e9


def best(run: Callable[[], object], *, repeat: int, work: float) -> float:
    """Work a second in the fastest of the runs, after one that does not count."""
    run()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return work / min(times)


class OneDnn:
    """torch's own prepacked linear."""

    def __init__(self, weight: torch.Tensor, num_rows: int) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def sweep(layers: list[Callable[[torch.Tensor], object]], x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        for layer in layers:
            layer(x)

    return run


def compare(k: int, n: int, rows: list[int], repeat: int, with_onednn: bool, quantization: str | None) -> None:
    count = max(1, COLD_BYTES // (2 * n * k))
    weight = torch.randn(n, k).mul_(k**-0.5).bfloat16()
    ours = [packed(weight, quantization) for _ in range(count)]
    outputs = {m: torch.empty(m, n, dtype=torch.bfloat16) for m in rows}
    weight_bytes = count * ours[0].nbytes
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        flops = 2.0 * m * n * k * count
        layers = [lambda x, layer=layer, out=outputs[m]: layer(x, out=out) for layer in ours]
        rate = best(sweep(layers, x), repeat=repeat, work=1)
        line = f"  M {m:5d}   {flops * rate / 1e12:6.2f} TFLOP/s {weight_bytes * rate / 1e9:6.1f} GB/s"
        if with_onednn:
            peers = [OneDnn(weight, m) for _ in range(count)]
            theirs = best(sweep(peers, x), repeat=repeat, work=1)
            line += f"   oneDNN {flops * theirs / 1e12:6.2f} {weight_bytes * theirs / 1e9:6.1f}   x {rate / theirs:.2f}"
        print(line, flush=True)


def packed(weight: torch.Tensor, quantization: str | None) -> PackedLinear:
    assert quantization is None
    layer = PackedLinear(*weight.shape, torch.bfloat16)
    layer.load_rows(0, weight)
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--shapes", help="some of the shapes, by name")
    parser.add_argument("--rows", default="1,4,16,64,128,256,2048")
    parser.add_argument("--threads", type=int, default=native.lib.num_threads())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-onednn", action="store_true")
    args = parser.parse_args()
    native.lib.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    rows = [int(m) for m in args.rows.split(",")]
    print(f"{native.lib.isa()}, {args.threads} threads, bfloat16; read {read_bandwidth():.1f} GB/s")
    with torch.inference_mode():
        for name, (k, n) in SHAPES[args.model].items():
            if args.shapes and name not in args.shapes.split(","):
                continue
            print(f"{name}: {k} -> {n}")
            compare(k, n, [m for m in rows if m * n < 64e6], args.repeat, not args.no_onednn, None)
    print(f"read {read_bandwidth():.1f} GB/s")


if __name__ == "__main__":
    main()
