"""Every native kernel against the machine: bytes or operations a second, and the share of what they could be at most.

    python benchmarks/native_kernels.py [--only norm gemm …] [--rows 1 64 2048]

The sizes are those of the Qwen3-0.6B shape in bfloat16. The least a call can take is its bytes (each one it must read
or write, once) at the rate at which as many are read again and again by `read_memory`, or its operations at the peak of
tile products, whichever is longer; the share is that over the time of the fastest call. Weights are read cold: so many
copies in turn that no cache holds them. Everything else is as warm as in a forward pass, and for a few microseconds of
work a call's own cost, Python's included (`empty call`), is most of it. Attention is `attention.py`'s. The machine's
limits are measured between the groups of kernels, and the best of them counts: the table is printed at the end.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import attention
import torch
from gemm import SHAPES
from roofline import best_seconds, peak_products

from minivllm.attention.backend import AttentionSpec
from minivllm.attention.backends.cpu_native import CpuNativeBackend
from minivllm.ops import (
    activation,
    bitmask,
    kv_layout,
    kv_write,
    native,
    rms_norm,
    rotary,
    rotary_kv_write,
    sampling,
    scaling,
    token_logprobs,
)
from minivllm.ops.linear import PackedLinear
from minivllm.ops.linear_int8 import PackedInt8Linear

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 3072, 16, 8, 128, 151936
BF16 = torch.bfloat16
SHARED_CACHE = 64 << 20  # what is larger is taken to be read from memory
MOST_LOGITS_ROWS = 64
COLD_BYTES = 640 << 20  # of weights, read in turn


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], object]
    num_bytes: float
    flop: float = 0.0
    calls: int = 1  # in one run; bytes and flop are of one
    int8: bool = False
    cold: bool = False


def small(rows: int) -> Iterator[Case]:
    """What works on hidden states."""
    x = torch.randn(rows, HIDDEN).to(BF16)
    residual, weight = torch.randn(rows, HIDDEN).to(BF16), torch.ones(HIDDEN, dtype=BF16)
    yield Case("norm: rms_norm", lambda: rms_norm.cpu(x, weight, 1e-6), 4 * rows * HIDDEN)
    added = functools.partial(rms_norm.add_cpu, x, residual, weight, 1e-6)
    yield Case("norm: rms_norm of a sum", added, 8 * rows * HIDDEN)
    q, k = (torch.randn(rows, heads, HEAD_DIM).to(BF16) for heads in (HEADS, KV_HEADS))
    angles = torch.rand(rows, HEAD_DIM // 2)  # true rotations: q and k are turned in place, and must not shrink
    positions, cos_sin = torch.arange(rows), torch.cat([angles.cos(), angles.sin()], 1)
    norms = rotary.HeadNorms(torch.ones(HEAD_DIM, dtype=BF16), torch.ones(HEAD_DIM, dtype=BF16), 1e-6)
    moved = 4 * rows * (HEADS + KV_HEADS) * HEAD_DIM
    yield Case("rotary", lambda: rotary.cpu(positions, q, k, cos_sin), moved)
    yield Case("rotary: and norms of heads", lambda: rotary.cpu(positions, q, k, cos_sin, norms), moved)
    v, slots = torch.randn_like(k), torch.arange(rows)
    for kind, size in (("bfloat16", 2), ("int8", 1), ("fp8_e4m3", 1)):
        layout = kv_layout.KvLayout(kind, KV_HEADS, HEAD_DIM, 128)
        cache = torch.zeros(layout.shape(-(-rows // 128)), dtype=torch.uint8)
        write = functools.partial(kv_write.cpu, k, v, cache, slots, layout=layout)
        yield Case(f"kv_write: {kind}", write, 2 * rows * KV_HEADS * HEAD_DIM * (2 + size))
        both = functools.partial(
            rotary_kv_write.cpu, positions, q, k, v, cos_sin, norms, cache, slots, layout=layout
        )
        moved = 2 * rows * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS + KV_HEADS * size)
        yield Case(f"rotary, norms and kv_write: {kind}", both, moved)
    gate_up = torch.randn(rows, 2 * INNER).to(BF16)
    yield Case("activation: silu_mul", lambda: activation.cpu(gate_up), 6 * rows * INNER)
    yield Case("activation: gelu_tanh_mul", lambda: activation.gelu_tanh_cpu(gate_up), 6 * rows * INNER)
    yield Case("scaling: scale", lambda: scaling.scale_cpu(x, 1.0), 4 * rows * HIDDEN)


def on_logits(rows: int) -> Iterator[Case]:
    """What works on logits, float32."""
    logits = torch.randn(rows, VOCAB) * 4
    size = 4 * rows * VOCAB
    seeds, positions = torch.arange(rows), torch.arange(rows)
    for name, degree in (("greedy", 0.0), ("temperature 1", 1.0)):
        degrees = torch.full((rows,), degree)
        draw = functools.partial(sampling.gumbel_argmax_cpu, logits, degrees, seeds, positions)
        yield Case(f"sampling: token, {name}", draw, size)
    top_k, top_p = torch.full((rows,), 50, dtype=torch.int32), torch.full((rows,), 0.9)
    min_p, scratch = torch.zeros(rows), torch.empty_like(logits)

    def truncate(k: torch.Tensor, p: torch.Tensor) -> None:
        scratch.copy_(logits)  # it works in place; the copy is counted
        sampling.top_k_top_p_min_p_cpu(scratch, k, p, min_p)

    every, whole = torch.full_like(top_k, VOCAB), torch.ones(rows)
    yield Case("sampling: copy, top-k 50", lambda: truncate(top_k, whole), 4 * size)
    yield Case("sampling: copy, top-p 0.9", lambda: truncate(every, top_p), 4 * size)
    yield Case("sampling: rows not finite", lambda: sampling.nonfinite_rows_cpu(logits), size)
    wanted = torch.randint(0, VOCAB, (rows, 8))
    yield Case("logprobs: of 8 tokens, and a rank", lambda: token_logprobs.cpu(logits, wanted), size)
    bits = torch.randint(-(2**31), 2**31, (rows, -(-VOCAB // 32)), dtype=torch.int32)
    every_row = torch.arange(rows)
    yield Case("bitmask", lambda: bitmask.cpu(scratch, every_row, bits), size + bits.nbytes)
    yield Case("scaling: soft_cap", lambda: scaling.soft_cap_cpu(scratch, 30.0), 2 * size)


def linear(rows: int) -> Iterator[Case]:
    """Linear layers, each with the epilogue that a layer gives it."""
    for cls in (PackedLinear, PackedInt8Linear):
        int8 = cls is PackedInt8Linear
        for name, (into, out) in SHAPES["qwen3-0.6b"].items():
            if name == "vocabulary" and rows > MOST_LOGITS_ROWS:
                continue
            layers = _copies(cls, into, out, gated=name == "gate_up")
            x = torch.randn(rows, into).to(BF16)
            result = torch.zeros(rows, out // 2 if name == "gate_up" else out, dtype=BF16)
            read = (1 if int8 else 2) * into * out + 2 * rows * (into + result.shape[1])
            run = functools.partial(_multiply, layers, name, x, result)
            kind = "int8" if int8 else "bf16"
            sizes = (2 * rows * into * out, len(layers), int8)
            yield Case(f"gemm: {name}, {kind}", run, read, *sizes, cold=True)
            if name == "vocabulary":
                read -= 2 * rows * out
                chosen = functools.partial(_choose, layers, x)
                yield Case(f"gemm: {name}, likeliest, {kind}", chosen, read, *sizes, cold=True)
    embedding = PackedLinear(VOCAB, HIDDEN, BF16)
    embedding.load_rows(0, torch.randn(VOCAB, HIDDEN).to(BF16))
    ids = torch.randint(0, VOCAB, (rows,))
    yield Case("embedding: gather_rows", lambda: embedding.rows(ids), 4 * rows * HIDDEN)


def _copies(cls: type[PackedLinear], into: int, out: int, *, gated: bool) -> list[PackedLinear]:
    layers = [cls(out, into, BF16, gated=gated)]
    layers += [cls(out, into, BF16, gated=gated) for _ in range(COLD_BYTES // layers[0].nbytes)]
    weight = torch.randn(out, into).mul_(into**-0.5).to(BF16)
    for layer in layers:
        layer.load_rows(0, weight)
    return layers


def _multiply(layers: list[PackedLinear], name: str, x: torch.Tensor, result: torch.Tensor) -> None:
    for layer in layers:
        if name == "gate_up":
            layer.silu_mul(x, out=result)
        elif name in ("o", "down"):
            layer.add_to(result, x)
        else:
            layer(x, out=result)


def _choose(layers: list[PackedLinear], x: torch.Tensor) -> None:
    for layer in layers:
        layer.likeliest(x)


class Limits:
    """The most that was seen of the machine so far: GB/s of reading, operations a second by type."""

    def __init__(self) -> None:
        self._memory = native.huge_pages(1 << 30)
        self._memory.fill_(1)
        self.read, self.peak = 0.0, {"bfloat16": 0.0, "int8": 0.0}
        self._warm_rates: dict[int, float] = {}

    def measure(self) -> None:
        self.read = max(self.read, self._rate(1 << 30, 0.3))
        for dtype in self.peak:
            self.peak[dtype] = max(self.peak[dtype], peak_products(dtype, 0.15))

    def warm(self, num_bytes: float) -> float:
        """GB/s of reading so many bytes again and again."""
        size = max(512, int(num_bytes) // 512 * 512)
        if size not in self._warm_rates:
            self._warm_rates[size] = self._rate(size, 0.03)
        return self._warm_rates[size]

    def _rate(self, size: int, seconds: float) -> float:
        address = self._memory.data_ptr()
        return size / best_seconds(lambda: native.lib.read_memory(address, size), seconds) / 1e9


@dataclass(frozen=True)
class Row:
    """What became of a case."""

    name: str
    rows: int
    seconds: float
    num_bytes: float
    flop: float
    int8: bool = False
    warm: float | None = None  # GB/s of reading as much from the caches

    def text(self, limits: Limits) -> str:
        peak = limits.peak["int8" if self.int8 else "bfloat16"]
        read = limits.read if self.warm is None else max(self.warm, limits.read)
        least = max(self.num_bytes / read / 1e9, self.flop / peak / 1e12 if peak else 0.0)
        operations = f"{self.flop / self.seconds / 1e12:.2f}" if self.flop else ""
        rate = f"{self.num_bytes / self.seconds / 1e9:.1f}"
        took = f"{1e6 * self.seconds:.1f}"
        return f"| {self.name} | {self.rows} | {took} | {rate} | {operations} | {least / self.seconds:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="what names begin with; attention is one")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 2048])
    parser.add_argument("--seconds", type=float, default=0.1, help="of measuring each")
    args = parser.parse_args()
    wanted, limits, found = tuple(args.only), Limits(), []
    nothing = torch.zeros(1, 1, dtype=BF16)
    empty = best_seconds(lambda: scaling.scale_cpu(nothing, 1.0), 0.05)
    for rows in args.rows:
        for cases in (small, on_logits, linear):
            if cases is on_logits and rows > MOST_LOGITS_ROWS:
                continue
            limits.measure()
            found += [
                _measure(case, rows, args.seconds, limits) for case in cases(rows) if case.name.startswith(wanted)
            ]
    if "attention".startswith(wanted):
        found += _attention()
    limits.measure()
    peaks = ", ".join(f"{dtype} {rate:.2f} T(FL)OP/s" for dtype, rate in limits.peak.items())
    print(f"{native.lib.isa()}, {native.lib.num_threads()} threads; read {limits.read:.1f} GB/s; tile products {peaks}")
    print(f"empty call: {1e6 * empty:.1f} µs\n")
    print("| kernel | rows | µs | GB/s | T(FL)OP/s | share |\n|---|---|---|---|---|---|")
    print("\n".join(row.text(limits) for row in found))


def _measure(case: Case, rows: int, seconds: float, limits: Limits) -> Row:
    took = best_seconds(case.run, seconds) / case.calls
    warm = limits.warm(case.num_bytes) if not case.cold and case.num_bytes <= SHARED_CACHE else None
    return Row(case.name, rows, took, case.num_bytes, case.flop, case.int8, warm)


def _attention() -> Iterator[Row]:
    for kind in ("auto", "int8"):
        backend = CpuNativeBackend(AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, 128, BF16, "cpu", kind))
        for name, lens, shared in (
            ("decode, 64 × 384", [384] * 64, 0),
            ("decode, 1 × 4096", [4096], 0),
            ("decode, 32 × (1024 shared + 64)", [1088] * 32, 1024),
        ):
            took, _, num_bytes = attention.decode(backend, lens, shared, 1.0, with_torch=False)
            flop = 4 * sum(lens) * HEADS * HEAD_DIM
            yield Row(f"attention: {name}, {kind}", len(lens), took, num_bytes, flop)
        for rows in (512, 4096):
            took, _ = attention.prefill(backend, rows, with_torch=False)
            num_bytes = 2 * rows * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
            yield Row(f"attention: prefill, {kind}", rows, took, num_bytes, 2 * rows * rows * HEADS * HEAD_DIM)


if __name__ == "__main__":
    torch.set_num_threads(1)  # two pools of threads would fight for the processors
    with torch.inference_mode():
        main()
