"""Linear layers against the machine: TFLOP/s, and GB/s of weights, at several numbers of rows, ours beside oneDNN.

    python benchmarks/gemm.py [--model qwen3-0.6b | llama-3.2-1b] [--shapes qkv,down] [--rows 1,16,64,…] [--threads N]
                              [--processor-time]

Each shape has so many copies of its weight that none is found in a cache, as in a model. oneDNN (bfloat16, through
torch) has its weight packed for that number of rows; int8 and int4 are `--quantization`'s, activations made int8 in the
call. All four and a read of 1 GiB (`roofline.py`) take turns; the fastest of the turns counts: machines drift.
`--processor-time` counts what the threads worked instead of what the clock says, for a machine that is busy with other
things: waiting is left out, but for what a thread waits spinning.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from roofline import bandwidth

from minivllm.ops import native
from minivllm.ops.linear import PackedLinear
from minivllm.ops.linear_int4 import PackedInt4Linear
from minivllm.ops.linear_int8 import PackedInt8Linear

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
COLD_BYTES = 400 << 20  # of bfloat16 weights, read in turn

Layer = Callable[[torch.Tensor], object]
Clock = Callable[[], float]


def onednn(weight: torch.Tensor, num_rows: int) -> Layer:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def ours(cls: type[PackedLinear], weight: torch.Tensor, out: torch.Tensor) -> Layer:
    layer = cls(*weight.shape, torch.bfloat16)
    layer.load_rows(0, weight)
    return lambda x: layer(x, out=out[: len(x)])


def seconds(layers: list[Layer], x: torch.Tensor, clock: Clock) -> float:
    began = clock()
    for layer in layers:
        layer(x)
    return clock() - began


def compare(k: int, n: int, rows: list[int], repeat: int, clock: Clock) -> None:
    """One line for each number of rows."""
    count = max(1, COLD_BYTES // (2 * n * k))
    weight = torch.randn(n, k).mul_(k**-0.5).bfloat16()
    out = torch.empty(max(rows), n, dtype=torch.bfloat16)
    bf16 = [ours(PackedLinear, weight, out) for _ in range(count)]
    int8 = [ours(PackedInt8Linear, weight, out) for _ in range(count)]
    int4 = [ours(PackedInt4Linear, weight, out) for _ in range(count)]
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        peer = [onednn(weight, m) for _ in range(count)]
        turns = [
            (*(seconds(layers, x, clock) for layers in (bf16, int8, int4, peer)), bandwidth(0.05))
            for _ in range(repeat)
        ]
        times, read = [min(turn[i] for turn in turns) for i in range(4)], max(turn[4] for turn in turns)
        flop, size = 2e-12 * m * n * k * count, 2e-9 * n * k * count
        shares = (1, 0.5, (1 / 2 + 1 / 128) / 2, 1)  # of bfloat16's bytes; int4 has a multiplier for 128 codes
        columns = [f"{flop / t:6.2f} T {size / t * share:5.1f} GB/s" for t, share in zip(times, shares)]
        kinds = " ".join(f"{kind} {column}" for kind, column in zip(("bf16", "int8", "int4", "oneDNN"), columns))
        print(f"  M {m:5d}  {kinds}  read {read:4.1f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--shapes", help="some of the shapes, by name")
    parser.add_argument("--rows", default="1,4,16,64,128,256,2048")
    parser.add_argument("--threads", type=int, default=native.lib.num_threads())
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--processor-time", action="store_true")
    args = parser.parse_args()
    native.lib.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    rows = [int(m) for m in args.rows.split(",")]
    clock = (lambda: time.process_time() / args.threads) if args.processor_time else time.perf_counter
    print(f"{native.lib.isa()}, {args.threads} threads")
    with torch.inference_mode():
        for name, (k, n) in SHAPES[args.model].items():
            if args.shapes is None or name in args.shapes.split(","):
                print(f"{name}: {k} -> {n}")
                compare(k, n, [m for m in rows if m * n < 64e6 or m <= 64], args.repeat, clock)


if __name__ == "__main__":
    main()
