"""Each kernel alone, at sizes of an 8B-shape model: bytes or operations a second, as a share of the card's ceiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu.clock import Ceilings, Clock
from minivllm.ops import cuda
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.linear import DenseLinear
from minivllm.ops.op import OpSpec
from minivllm.ops.paged_attention import Options

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
VOCAB = 128256
EXPERTS, EXPERTS_OF_TOKEN, EXPERT_HIDDEN, EXPERT_INNER = 128, 8, 2048, 768


class Kernel(NamedTuple):
    name: str
    work: Callable[[], object]
    num_bytes: int = 0  # that must be read and written
    num_flops: int = 0


class Result(NamedTuple):
    name: str
    seconds: float
    rate: str
    share: float  # of the ceiling that binds


def measure(kernel: Kernel, clock: Clock, ceilings: Ceilings) -> Result:
    seconds = clock.seconds(kernel.work)
    by_bytes, by_flops = kernel.num_bytes / ceilings.bandwidth, kernel.num_flops / ceilings.flops
    if by_bytes >= by_flops:
        rate = f"{kernel.num_bytes / seconds / 1e9:,.0f} GB/s"
    else:
        rate = f"{kernel.num_flops / seconds / 1e12:,.0f} TFLOP/s"
    return Result(kernel.name, seconds, rate, max(by_bytes, by_flops) / seconds)


class Attention:
    """A cache that is full of requests of one length, each in blocks of its own, dealt at random."""

    def __init__(
        self, batch: int, context: int, query_len: int, kv_dtype: str = "bfloat16", block_size: int = 64,
        bound: int | None = None,
    ) -> None:  # fmt: skip
        """bound: of the lengths, that launches are made for, as a captured step's; else the lengths themselves."""
        device = "cuda"
        self.layout = RowLayout(kv_dtype, KV_HEADS, HEAD_DIM, block_size)
        blocks = -(-context // block_size)
        order = torch.randperm(batch * blocks, device=device).int()
        self.table = order.view(batch, blocks)
        shape = self.layout.shape(batch * blocks)
        self.cache = torch.randint(
            0, 64, shape, dtype=torch.uint8, device=device
        )  # small numbers in any type
        self.q = torch.randn(batch * query_len, HEADS, HEAD_DIM, device=device).bfloat16()
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * query_len
        self.context, self.query_len, self.batch = context, query_len, batch
        self.bound = bound or context
        self.options = Options(scale=HEAD_DIM**-0.5)

    @property
    def num_bytes(self) -> int:
        return self.cache.nbytes + 2 * self.q.nbytes

    @property
    def num_flops(self) -> int:
        """Of what is seen: two products."""
        seen = self.query_len * self.context - self.query_len * (self.query_len - 1) // 2
        return 4 * HEADS * HEAD_DIM * seen * self.batch

    def triton(self, *, batch_invariant: bool = False) -> object:
        from minivllm.ops.triton.paged_attention import BatchShape, paged_attention

        return paged_attention(
            self.q, self.cache, self.table, self.seq_lens, self.starts, layout=self.layout, options=self.options,
            shape=BatchShape(self.query_len, self.bound), batch_invariant=batch_invariant,
        )  # fmt: skip

    def cuda(self, num_parts: int | None = None) -> object:
        return cuda.decode_attention(
            self.q, self.cache, self.table, self.seq_lens,
            layout=self.layout, options=self.options, max_seq_len=self.bound,
            num_parts=num_parts,
        )  # fmt: skip

    def kernels(self) -> Iterator[Kernel]:
        what = f"{self.batch} × {self.query_len} rows over {self.context:,} tokens, {self.layout.dtype}"
        what += f", for {self.bound:,}" if self.bound != self.context else ""
        yield Kernel(f"attention (triton), {what}", self.triton, self.num_bytes, self.num_flops)
        yield Kernel(
            f"attention (triton, batch invariant), {what}",
            lambda: self.triton(batch_invariant=True), self.num_bytes, self.num_flops,
        )  # fmt: skip
        if self.query_len == 1:
            why_not = cuda.decode_why_not(self.q.dtype, self.layout, HEADS // KV_HEADS)
            if why_not is None:
                yield Kernel(f"attention (CUDA C++), {what}", self.cuda, self.num_bytes, self.num_flops)
            else:
                print(f"attention (CUDA C++) is left out: {why_not}")


def attention_kernels() -> Iterator[Kernel]:
    for batch, context in ((1, 131072), (8, 32768), (64, 8192), (256, 2048)):
        yield from Attention(batch, context, 1).kernels()
    for kv_dtype in ("fp8_e4m3", "int8"):
        yield from Attention(64, 8192, 1, kv_dtype).kernels()
    for batch, length in ((1, 8192), (4, 2048)):
        yield from Attention(batch, length, length).kernels()


def captured_kernels(bound: int = 32768) -> Iterator[Kernel]:
    """Decodes as a captured step launches them: for --max-model-len. CUDA C++ also in other numbers of parts."""
    for batch, context in ((1, 512), (8, 512), (64, 512), (256, 512), (1, 8192), (8, 8192), (64, 2048), (64, 8192)):
        work = Attention(batch, context, 1, bound=bound)
        for kernel in work.kernels():
            yield kernel._replace(work=_captured(kernel.work))
        if cuda.extension()[1] is None:
            for num_parts in (1, 2, 4, 8, 16, 32):
                in_parts = _captured(lambda n=num_parts, w=work: w.cuda(n))
                yield Kernel(f"  the last in {num_parts} parts", in_parts, work.num_bytes)


def _captured(work: Callable[[], object]) -> Callable[[], object]:
    """The same as a graph: what is short is not to be measured by how fast the host launches it."""
    work()  # no module may be loaded in a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


WEIGHTS = {  # out_features, in_features, is_gated, of an 8B and of a 1B shape
    "8B qkv": (6144, 4096, False), "8B o": (4096, 4096, False), "8B gate and up": (28672, 4096, True),
    "8B down": (4096, 14336, False), "8B head": (128256, 4096, False), "1B qkv": (3072, 2048, False),
    "1B o": (2048, 2048, False), "1B gate and up": (16384, 2048, True), "1B down": (2048, 8192, False),
    "1B head": (128256, 2048, False),
}  # fmt: skip


def few_rows_kernels(
    device: str = "cuda", *, weights: dict[str, tuple[int, int, bool]] = WEIGHTS, counts: tuple[int, ...] = (1, 8, 16),
    least_bytes: int = 1 << 30,
) -> Iterator[Kernel]:  # fmt: skip
    """Products of few rows as a captured step launches them, one behind another, of so many weights that no cache holds
    them; with what follows them (residual, SiLU), beside cuBLAS with the same."""
    from minivllm.ops.linear_cuda import CublasLinear
    from minivllm.ops.linear_few_rows import FewRowsFp8Linear, FewRowsInt8Linear, FewRowsLinear

    classes = {"cuBLAS": CublasLinear, "CUDA C++": FewRowsLinear, "int8": FewRowsInt8Linear, "fp8": FewRowsFp8Linear}
    for what, (out_features, in_features, is_gated) in weights.items():
        for label, make in classes.items():
            size = out_features * in_features * (1 if label in ("int8", "fp8") else 2)
            linears = []
            for _ in range(max(2, -(-least_bytes // size))):
                linears.append(make(out_features, in_features, torch.bfloat16, gated=is_gated, device=device))
                linears[-1].load_rows(0, torch.randn(out_features, in_features, device=device))
            for rows in counts:
                x = torch.randn(rows, in_features, device=device).bfloat16()
                residual = torch.zeros(rows, out_features, device=device).bfloat16()
                work = partial(_multiply_all, linears, x, residual, what.split()[-1])
                yield Kernel(
                    f"linear of few rows ({label}), {what}, {rows} rows",
                    _captured(work) if device == "cuda" else work, sum(linear.nbytes for linear in linears),
                )  # fmt: skip


def _multiply_all(linears: list[DenseLinear], x: torch.Tensor, residual: torch.Tensor, what: str) -> None:
    """By each, with what follows the projection `what` in a model."""
    for linear in linears:
        if linear.gated:
            linear.silu_mul(x)
        elif what in ("o", "down"):
            linear.add_to(residual, x)
        else:
            linear(x, out_dtype=torch.float32 if what == "head" else None)


def other_kernels() -> Iterator[Kernel]:
    yield from layer_kernels()
    yield from pointwise_kernels("cuda")
    yield from expert_kernels("cuda")


def pointwise_kernels(device: str, counts: tuple[int, ...] = (1, 64, 8192)) -> Iterator[Kernel]:
    """What Gemma and untied embeddings need besides."""
    from minivllm.ops.activation import gelu_tanh_mul
    from minivllm.ops.embedding import embedding
    from minivllm.ops.scaling import scale

    spec = OpSpec(device, torch.bfloat16)
    gather, activate, multiply = embedding.select(spec), gelu_tanh_mul.select(spec), scale.select(spec)
    table = torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16, device=device)
    for rows in counts:
        ids = torch.randint(0, VOCAB, (rows,), device=device)
        x = torch.randn(rows, HIDDEN, device=device).bfloat16()
        gate_up = torch.randn(rows, 2 * INNER, device=device).bfloat16()
        yield Kernel(f"embedding, {rows} rows", lambda i=ids: gather(i, table), 2 * x.nbytes + ids.nbytes)
        yield Kernel(f"GELU·mul, {rows} rows", lambda g=gate_up: activate(g), 3 * gate_up.nbytes // 2)
        yield Kernel(f"scale, {rows} rows", lambda x=x: multiply(x, 1.0), 2 * x.nbytes)


def expert_kernels(device: str, counts: tuple[int, ...] = (1, 64, 8192)) -> Iterator[Kernel]:
    """A layer of experts of a 30B-A3B shape; only the weights of experts that are asked must be read."""
    from minivllm.ops.moe import moe

    work = moe.select(OpSpec(device, torch.bfloat16))
    gate_up = torch.zeros(EXPERTS, 2 * EXPERT_INNER, EXPERT_HIDDEN, dtype=torch.bfloat16, device=device)
    down = torch.zeros(EXPERTS, EXPERT_HIDDEN, EXPERT_INNER, dtype=torch.bfloat16, device=device)
    for rows in counts:
        x = torch.randn(rows, EXPERT_HIDDEN, device=device).bfloat16()
        weights, ids = torch.randn(rows, EXPERTS, device=device).softmax(-1).topk(EXPERTS_OF_TOKEN)
        asked = len(ids.unique())
        yield Kernel(
            f"experts, {rows} rows, {EXPERTS_OF_TOKEN} of {EXPERTS}",
            lambda x=x, i=ids, w=weights: work(x, gate_up, down, i, w),
            asked * (gate_up[0].nbytes + down[0].nbytes) + 2 * x.nbytes,
            6 * ids.numel() * EXPERT_HIDDEN * EXPERT_INNER,
        )


def layer_kernels() -> Iterator[Kernel]:
    from minivllm.layers.linear import linear_class
    from minivllm.ops.activation import silu_mul
    from minivllm.ops.kv_write import kv_write
    from minivllm.ops.rms_norm import rms_norm
    from minivllm.ops.rotary import rotary
    from minivllm.ops.rotary_kv_write import rotary_kv_write

    device, dtype = "cuda", torch.bfloat16
    for rows in (1, 64, 8192):
        spec = OpSpec(device, dtype)
        x = torch.randn(rows, HIDDEN, device=device).to(dtype)
        weight = torch.ones(HIDDEN, device=device).to(dtype)
        norm = rms_norm.select(spec)
        yield Kernel(f"RMSNorm, {rows} rows", lambda x=x, w=weight, f=norm: f(x, w, 1e-5), 2 * x.nbytes)
        gate_up = torch.randn(rows, 2 * INNER, device=device).to(dtype)
        activate = silu_mul.select(spec)
        yield Kernel(f"SiLU·mul, {rows} rows", lambda g=gate_up, f=activate: f(g), 3 * gate_up.nbytes // 2)
        qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device).to(dtype)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        positions = torch.arange(rows, device=device)
        table = torch.randn(max(rows, 2), HEAD_DIM, device=device)
        turn = rotary.select(spec)
        yield Kernel(
            f"rotary, {rows} rows", lambda a=(positions, q, k, table, None), f=turn: f(*a),
            2 * (q.numel() + k.numel()) * 2,
        )  # fmt: skip
        layout = RowLayout("bfloat16", KV_HEADS, HEAD_DIM, 64)
        cache = torch.zeros(layout.shape(-(-rows // 64)), dtype=torch.uint8, device=device)
        write = kv_write.select(
            OpSpec(device, dtype, {"head_dim": HEAD_DIM, "block_size": 64, "group": HEADS // KV_HEADS})
        )
        yield Kernel(
            f"KV write, {rows} rows", lambda a=(k, v, cache, positions), f=write, y=layout: f(*a, layout=y),
            4 * k.numel() * 2,
        )  # fmt: skip
        turn_and_write = rotary_kv_write.select(spec)
        yield Kernel(
            f"rotary and KV write, {rows} rows",
            lambda a=(positions, q, k, v, table, None, cache, positions), f=turn_and_write, y=layout: f(*a, layout=y),
            2 * (2 * q.numel() + 5 * k.numel()),  # q and k both ways, v read, both written to the cache
        )
        formats = {None: "cuBLAS", "int8": "int8", "fp8": "fp8", "batch_invariant": "batch invariant"}
        for format_, label in formats.items():
            try:
                make = linear_class(INNER, HIDDEN, dtype=dtype, device=device, quantization=format_)
            except (KeyError, ValueError) as error:
                print(f"linear ({label}) is left out: {error}")
                continue
            linear = make(INNER, HIDDEN, dtype)
            linear.load_rows(0, torch.randn(INNER, HIDDEN, device=device))
            num_bytes = linear.nbytes + x.nbytes + rows * INNER * 2
            yield Kernel(
                f"linear ({label}), {rows} rows",
                lambda f=linear, x=x: f(x),
                num_bytes,
                2 * rows * HIDDEN * INNER,
            )
