"""What this machine can do at best, now: read bandwidth, and GEMM rates at several numbers of rows.

    python benchmarks/roofline.py [--json] [--seconds 0.4]

Virtual machines drift by a factor of two within an hour, so every comparison measures this beside itself, in the
same run. Other benchmarks import `measure`. All numbers use every thread of the kernel pool.

Bandwidth is wide vector loads with a prefetch over a buffer in huge pages. A GEMM rate is the best of oneDNN with
its weight packed ahead (through torch) and our own kernel, over the four matrix shapes of a Qwen3-0.6B layer one after
another, as a forward pass meets them (31 MB in bf16: at few rows the rate is the memory's, the caches' included). The
products' peak is no kernel's: tile products of random numbers from L1, nothing stored, which nothing on this machine
can pass.
"""

from __future__ import annotations

import argparse
import json
import mmap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from minivllm.ops.linear import PackedLinear
from minivllm.ops.linear_int8 import PackedInt8Linear
from minivllm.utils import native

ROWS = (1, 16, 32, 64, 128, 256, 2048)
# (out_features, in_features) of qkv, o, gate_up and down.
LAYER = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
LAYER_FLOP_A_ROW = 2 * sum(out * into for out, into in LAYER)


@dataclass(frozen=True)
class Roofline:
    """GB are 10⁹ bytes; a multiply-add is two operations."""

    threads: int
    isa: str
    bandwidth_gbs: float  # from DRAM, 1.07 GB buffer in huge pages
    bandwidth_small_pages_gbs: float
    bf16_tflops: dict[int, float]  # by rows; the better of the two below
    bf16_onednn_tflops: dict[int, float]
    bf16_ours_tflops: dict[int, float]
    int8_tops: dict[int, float]  # oneDNN, 8-bit activations and weights; empty where torch has none
    int8_ours_tops: dict[int, float]
    bf16_peak_tflops: float  # of tile products alone; 0 where there are no tiles
    int8_peak_tops: float

    def gemm_seconds(self, flop: float, rows: int, *, int8: bool = False) -> float:
        """Of `flop` operations at the best rate of any kernel, for the nearest measured number of rows up to `rows`."""
        rates = self.int8_ours_tops if int8 else self.bf16_tflops
        measured = max(m for m in rates if m <= max(rows, min(rates)))
        rate = max(rates[measured], self.int8_tops.get(measured, 0.0)) if int8 else rates[measured]
        return flop / (rate * 1e12)

    def product_seconds(self, flop: float, rows: int, *, int8: bool = False) -> float:
        """Of `flop` operations at the peak of tile products, 16 rows a tile. Without tiles, as `gemm_seconds`."""
        peak = self.int8_peak_tops if int8 else self.bf16_peak_tflops
        if not peak:
            return self.gemm_seconds(flop, rows, int8=int8)
        return flop / (peak * 1e12) * (-(-rows // 16) * 16 / rows)

    def read_seconds(self, num_bytes: float) -> float:
        return num_bytes / (self.bandwidth_gbs * 1e9)


def best_seconds(run: Callable[[], object], seconds: float) -> float:
    """The fastest call of those that fit into `seconds`, after one to warm up."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def bandwidth(seconds: float, *, megabytes: int = 1024, huge_pages: bool = True) -> float:
    """GB/s of reading a buffer once."""
    size = megabytes << 20
    # Private, as weights and caches are: shared memory gets no huge pages unless the system says so elsewhere.
    with mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        view = np.frombuffer(memory, np.uint8)
        view[::4096] = 1  # every page is there
        start = -view.ctypes.data % (2 << 20)
        address = view.ctypes.data + start
        fastest = best_seconds(lambda: native.lib.read_memory(address, size), seconds)
        del view
    return size / fastest / 1e9


def onednn_bf16(rows: int, seconds: float) -> float:
    """TFLOP/s of the layer's matrices, each packed ahead for this number of rows."""
    calls = []
    for out, into in LAYER:
        weight = torch.randn(out, into, dtype=torch.bfloat16)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        calls.append((torch.randn(rows, into, dtype=torch.bfloat16), packed))
    linear = torch.ops.mkldnn._linear_pointwise

    def run() -> None:
        for x, weight in calls:
            linear(x, weight, None, "none", [], "")

    return LAYER_FLOP_A_ROW * rows / best_seconds(run, seconds) / 1e12


def onednn_int8(rows: int, seconds: float) -> float:
    """TOP/s of unsigned 8-bit activations by signed 8-bit weights packed ahead, one scale a column."""
    calls = []
    for out, into in LAYER:
        weight = torch.randint(-127, 128, (out, into), dtype=torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        x = torch.randint(0, 256, (rows, into), dtype=torch.uint8)
        calls.append((x, packed, torch.full((out,), 0.01), torch.zeros(out, dtype=torch.int64)))
    linear = torch.ops.onednn.qlinear_pointwise

    def run() -> None:
        for x, weight, scales, zeros in calls:
            linear(x, 0.02, 128, weight, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "")

    return LAYER_FLOP_A_ROW * rows / best_seconds(run, seconds) / 1e12


def peak_products(dtype: str, seconds: float) -> float:
    """TFLOP/s or TOP/s of all threads multiplying tiles; 0 where this processor has none."""
    rounds = 20_000  # 5 ms
    flop = native.lib.peak_products(dtype, 1) * rounds
    return flop / best_seconds(lambda: native.lib.peak_products(dtype, rounds), seconds) / 1e12


def ours(cls: type[PackedLinear], rows: int, seconds: float) -> float:
    """TFLOP/s of our kernel on the same matrices."""
    calls = []
    for out, into in LAYER:
        linear = cls(out, into, torch.bfloat16)
        linear.load_rows(0, torch.randn(out, into, dtype=torch.bfloat16))
        calls.append((linear, torch.randn(rows, into, dtype=torch.bfloat16)))

    def run() -> None:
        for linear, x in calls:
            linear(x)

    return LAYER_FLOP_A_ROW * rows / best_seconds(run, seconds) / 1e12


def measure(seconds: float = 0.4, rows: tuple[int, ...] = ROWS) -> Roofline:
    """All of it, `seconds` a number (about 10 s in all by default)."""
    threads = native.lib.num_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        onednn = {m: onednn_bf16(m, seconds) for m in rows}
        try:
            int8 = {m: onednn_int8(m, seconds) for m in rows}
        except (AttributeError, RuntimeError):
            int8 = {}
    finally:
        torch.set_num_threads(before)
    bf16 = {m: ours(PackedLinear, m, seconds) for m in rows}
    return Roofline(
        threads=threads,
        isa=native.lib.isa(),
        bandwidth_gbs=bandwidth(2 * seconds),
        bandwidth_small_pages_gbs=bandwidth(2 * seconds, huge_pages=False),
        bf16_tflops={m: max(onednn[m], bf16[m]) for m in rows},
        bf16_onednn_tflops=onednn,
        bf16_ours_tflops=bf16,
        int8_tops=int8,
        int8_ours_tops={m: ours(PackedInt8Linear, m, seconds) for m in rows},
        bf16_peak_tflops=peak_products("bfloat16", seconds),
        int8_peak_tops=peak_products("int8", seconds),
    )


def read_table(line: dict) -> Roofline:
    """A Roofline again from what `asdict` and JSON made of it."""
    values = {field.name: line[field.name] for field in fields(Roofline)}
    return Roofline(
        **{
            name: {int(m): rate for m, rate in value.items()} if isinstance(value, dict) else value
            for name, value in values.items()
        }
    )


def table(roof: Roofline) -> str:
    """For people."""
    lines = [
        f"{roof.threads} threads, {roof.isa}",
        f"read {roof.bandwidth_gbs:.1f} GB/s ({roof.bandwidth_small_pages_gbs:.1f} in small pages)",
        f"tile products alone: bf16 {roof.bf16_peak_tflops:.2f} TFLOP/s, int8 {roof.int8_peak_tops:.2f} TOP/s",
        f"{'rows':>6}{'bf16 oneDNN':>13}{'bf16 ours':>11}{'int8 oneDNN':>13}{'int8 ours':>11}   TFLOP/s (TOP/s)",
    ]
    for m in roof.bf16_tflops:
        int8 = f"{roof.int8_tops[m]:13.3f}" if roof.int8_tops else f"{'-':>13}"
        bf16 = f"{roof.bf16_onednn_tflops[m]:13.3f}{roof.bf16_ours_tflops[m]:11.3f}"
        lines.append(f"{m:6}{bf16}{int8}{roof.int8_ours_tops[m]:11.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--seconds", type=float, default=0.4, help="of measuring each number")
    args = parser.parse_args()
    with torch.inference_mode():
        roof = measure(args.seconds)
    print(json.dumps(asdict(roof)) if args.json else table(roof))


if __name__ == "__main__":
    main()
