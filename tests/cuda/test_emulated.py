"""The arithmetic of csrc/cuda without a card: the kernels' source runs on fibers, against the float64 reference.

What this cannot show: what a card does with it. `tests/gpu` runs the same cases there.
"""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

import minivllm
import tests.gpu.interpreter  # noqa: F401  before the kernels that the cases import
from benchmarks.gpu import kernels
from minivllm.ops import cuda, kv_write
from minivllm.ops.cuda import block_ranges
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.linear import linear
from minivllm.ops.linear_few_rows import FewRowsLinear
from minivllm.ops.linear_int8 import int8_linear, invariant_int8_linear
from minivllm.ops.op import OpSpec
from minivllm.ops.paged_attention import Options, _attend
from minivllm.ops.sampling import top_k_top_p_min_p
from tests.cuda.emulated import KV_CODES, EmulatedExtension, compiler, emulate, library, pointer
from tests.gpu.case import max_diff
from tests.gpu.cases.cuda import CASES
from tests.gpu.cases.sampling import odd_truncation, truncation

pytestmark = pytest.mark.skipif(
    compiler() is None, reason="NOT RUN: there is no C++ compiler, so the arithmetic of csrc/cuda is not checked"
)
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
SEGMENT = 1024


class Problem:
    """A decode batch over a cache whose blocks are dealt at random; what no token was written to is NaN."""

    def __init__(
        self, seq_lens, dtype=torch.bfloat16, kv=None, head_dim=128, group=4, block_size=16, seed=0, **options
    ):
        generator = torch.Generator().manual_seed(seed)
        self.layout = RowLayout(kv or NAMES[dtype], 2, head_dim, block_size)
        self.options = Options(scale=head_dim**-0.5, **options)
        self.num_heads = 2 * group
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        num_blocks = [-(-n // block_size) for n in seq_lens]
        order = torch.randperm(sum(num_blocks) + 3, generator=generator).int()
        self.cache = torch.full(self.layout.shape(len(order)), 0xFF, dtype=torch.uint8)
        self.table = torch.full((len(seq_lens), max(num_blocks) + 1), -1, dtype=torch.int32)
        for b, seq_len in enumerate(seq_lens):
            begin = sum(num_blocks[:b])
            self.table[b, : num_blocks[b]] = order[begin : begin + num_blocks[b]]
            positions = torch.arange(seq_len)
            slots = self.table[b].long()[positions // block_size] * block_size + positions % block_size
            k, v = torch.randn(2, seq_len, 2, head_dim, generator=generator).to(dtype)
            kv_write.reference(
                k, v, self.cache, slots, layout=self.layout,
                k_scale=self.options.k_scale, v_scale=self.options.v_scale,
            )  # fmt: skip
        wide = torch.randn(len(seq_lens), self.num_heads + 3, head_dim, generator=generator).to(dtype)
        self.q = wide[:, : self.num_heads]  # rows that lie apart

    def run(self, max_segments: int | None = None, num_parts: int | None = None) -> torch.Tensor:
        layout, options, q = self.layout, self.options, self.q
        max_segments = max_segments or -(-int(self.seq_lens.max()) // SEGMENT)
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        parts = torch.full((len(q) * max_segments * self.num_heads, layout.head_dim + 2), torch.nan).flatten()
        sums, tops = parts.split([parts.numel() // (layout.head_dim + 2) * n for n in (layout.head_dim, 2)])
        is_fp8 = layout.dtype == "fp8_e4m3"
        sizes = (ctypes.c_int64 * 16)(
            len(q), self.num_heads, layout.num_kv_heads, layout.head_dim, layout.block_size, max_segments,
            options.sliding_window or 0, num_parts or max_segments, q.dtype == torch.bfloat16, *q.stride()[:2],
            out.stride(0), self.table.stride(0), *self.cache.stride()[:3],
        )  # fmt: skip
        factors = (ctypes.c_float * 3)(
            options.scale * (options.k_scale if is_fp8 else 1),
            options.softcap,
            options.v_scale if is_fp8 else 1,
        )
        served = library().emulated_decode(
            pointer(out), pointer(q), pointer(self.cache), pointer(self.table), pointer(self.seq_lens),
            pointer(sums), pointer(tops), pointer(options.sinks), sizes, factors, KV_CODES.get(layout.dtype, 0),
        )  # fmt: skip
        assert served
        return out

    def expected(self) -> torch.Tensor:
        rows = []
        for b, seq_len in enumerate(self.seq_lens.tolist()):
            pages = self.cache[self.table[b, : -(-seq_len // self.layout.block_size)].long()]
            k, v = (
                self.layout.read(pages, half, scale).transpose(0, 1).flatten(1, 2)[:, :seq_len].double()
                for half, scale in enumerate((self.options.k_scale, self.options.v_scale))
            )
            rows.append(_attend(self.q[b : b + 1].double(), k, v, self.options))
        return torch.cat(rows)

    def check(self) -> None:
        difference = (self.run().double() - self.expected()).abs().max().item()
        assert difference < TOLERANCE[self.q.dtype] + 8e-3 * (self.layout.dtype in KV_CODES), difference


@pytest.mark.parametrize(
    "name",
    [
        "decode_f16_head_dim-64_group-4", "decode_fp8_e4m3_head_dim-128_group-4", "decode_all", "captured_int8",
        "truncation_130", "truncation_9001", "odd_truncation_130", "odd_truncation_9001",
    ],  # fmt: skip
)
def test_the_cards_own_cases_are_right_of_the_emulated_kernels(name: str, monkeypatch: pytest.MonkeyPatch):
    emulate(monkeypatch)
    assert cuda.decode_why_not(torch.float16, RowLayout("float16", 2, 64, 64), 4) is None
    check = CASES[f"cuda_{name}"]("cpu", False)
    assert max_diff(check.run(), check.expected()) <= check.tolerance


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("cuda_few_rows")])
def test_a_product_of_few_rows_is_right_whatever_follows_it(name: str, monkeypatch: pytest.MonkeyPatch):
    emulate(monkeypatch)
    check = CASES[name]("cpu", False)
    assert max_diff(check.run(), check.expected()) <= check.tolerance


def test_the_benchmark_multiplies_few_rows_with_what_follows_them(monkeypatch: pytest.MonkeyPatch):
    emulate(monkeypatch)
    weights = {"tiny qkv": (16, 32, False), "tiny down": (16, 32, False), "tiny gate and up": (32, 16, True)}
    made = list(kernels.few_rows_kernels("cpu", weights=weights, counts=(1, 3), least_bytes=1))
    assert len(made) == 3 * 4 * 2
    for kernel in made:
        kernel.work()
        assert kernel.num_bytes > 0


def test_linear_layers_take_the_kernel_where_it_is_built_and_measured(monkeypatch: pytest.MonkeyPatch):
    spec = OpSpec("cuda", torch.bfloat16, {"in_features": 64})
    assert cuda.few_rows_why_not(OpSpec("cpu", torch.bfloat16)) == "needs CUDA, got cpu"
    monkeypatch.setattr(cuda, "extension", lambda: (None, "built without CUDA kernels"))
    assert linear.select(spec).__name__ == "CublasLinear"
    emulate(monkeypatch)
    assert linear.select(spec).__name__ == "FewRowsLinear"
    assert int8_linear.select(spec).__name__ == "FewRowsInt8Linear"
    assert invariant_int8_linear.select(spec).__name__ == "TritonInt8Linear"  # what batch_invariant() names
    assert linear.select(OpSpec("cuda", torch.bfloat16, {"in_features": 20})).__name__ == "CublasLinear"
    assert linear.select(OpSpec("cuda", torch.float32)).__name__ == "CublasLinear"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
    assert linear.select(spec).__name__ == "CublasLinear"


def test_more_rows_or_rows_that_are_not_aligned_are_another_kernels(monkeypatch: pytest.MonkeyPatch):
    emulate(monkeypatch)
    x = torch.zeros(20, 64, dtype=torch.bfloat16)
    assert cuda.few_rows_fits(x[:16, :32], x[:16, :32], None, None)
    assert not cuda.few_rows_fits(x[:17], x[:17], None, None) and not cuda.few_rows_fits(x[:0], x[:0], None, None)
    assert not cuda.few_rows_fits(x[:4, :32], x[:4, 1:33], None, None)
    assert not cuda.few_rows_fits(x[:4, ::2], x[:4], None, None)
    assert not cuda.few_rows_fits(x[:4].half(), x[:4], None, None)
    few = FewRowsLinear(24, 64, torch.bfloat16, device="cpu")
    few.load_rows(0, torch.ones(24, 64))
    assert few(x).shape == (20, 24)  # by cuBLAS's class, whose own tests are elsewhere


def test_few_rows_are_added_to_a_residual_of_another_type(monkeypatch: pytest.MonkeyPatch):
    emulate(monkeypatch)
    few = FewRowsLinear(24, 64, torch.bfloat16, device="cpu")
    few.load_rows(0, torch.ones(24, 64))
    residual, bias = torch.full((3, 24), 0.5), torch.ones(24, dtype=torch.bfloat16)
    few.add_to(residual, torch.ones(3, 64, dtype=torch.bfloat16), bias)
    assert (residual == 65.5).all()


def test_a_cache_that_no_kernel_reads_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "minivllm._cuda", None)  # as where it was not built
    monkeypatch.delattr(minivllm, "_cuda", raising=False)
    missing = cuda.extension.__wrapped__()
    monkeypatch.setattr(cuda, "extension", lambda: missing)
    assert "built without CUDA kernels" in cuda.decode_why_not(torch.float16, RowLayout("float16", 2, 64, 64), 4)
    monkeypatch.setattr(cuda, "extension", lambda: (EmulatedExtension, None))
    reasons = [
        cuda.decode_why_not(dtype, RowLayout(kv, 2, head_dim, block_size), group)
        for dtype, kv, head_dim, block_size, group in (
            (torch.float32, "float32", 128, 64, 4), (torch.float16, "bfloat16", 128, 64, 4),
            (torch.float16, "int8", 64, 64, 4), (torch.float16, "float16", 128, 64, 17),
            (torch.float16, "float16", 256, 64, 9), (torch.float16, "float16", 128, 24, 4),
        )
    ]  # fmt: skip
    assert None not in reasons and len(set(reasons)) == 6


def test_a_card_with_little_shared_memory_decodes_by_triton_what_needs_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "extension", lambda: (EmulatedExtension, None))
    large, card = RowLayout("bfloat16", 2, 256, 64), SimpleNamespace(shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert cuda.decode_why_not(torch.bfloat16, large, 4) is None
    del card.shared_memory_per_block_optin  # as of an older torch
    assert "128 KiB of shared memory" in cuda.decode_why_not(torch.bfloat16, large, 4)
    for kv, head_dim in (("bfloat16", 128), ("int8", 256), ("fp8_e4m3", 256)):
        assert cuda.decode_why_not(torch.bfloat16, RowLayout(kv, 2, head_dim, 64), 4) is None


def test_rows_are_truncated_by_the_kernel_where_it_is_built_and_takes_so_many_logits(monkeypatch: pytest.MonkeyPatch):
    def chosen(vocab_size: int) -> str:
        return top_k_top_p_min_p.select(OpSpec("cuda", torch.float32, {"vocab_size": vocab_size})).__module__

    monkeypatch.setattr(cuda, "extension", lambda: (EmulatedExtension, None))
    assert chosen(1 << 19) == "minivllm.ops.cuda"
    assert chosen((1 << 19) + 1) == "minivllm.ops.triton.sampling"
    monkeypatch.setattr(cuda, "extension", lambda: (None, "built without CUDA kernels"))
    assert chosen(1 << 19) == "minivllm.ops.triton.sampling"


@pytest.mark.parametrize("make", [truncation, odd_truncation])
def test_a_row_that_a_cluster_of_blocks_truncates_keeps_what_it_keeps_by_a_block_of_its_own(make, monkeypatch):
    emulate(monkeypatch)

    def row_by_row(logits: torch.Tensor, *asked: torch.Tensor) -> None:
        for i in range(len(logits)):
            cuda.top_k_top_p_min_p(logits[i : i + 1], *(each[i : i + 1] for each in asked))

    together = make("cpu", False, vocab_size=4001, truncate=cuda.top_k_top_p_min_p).run()
    alone = make("cpu", False, vocab_size=4001, truncate=row_by_row).run()
    assert torch.equal(together.nan_to_num(nan=7.0), alone.nan_to_num(nan=7.0))


def test_truncation_touches_no_number_beside_its_rows(monkeypatch: pytest.MonkeyPatch):
    emulate(monkeypatch)
    wide = torch.randn(3, 517, generator=torch.Generator().manual_seed(0))
    before = wide.clone()
    few, half, most = torch.tensor([5, 0, 0], dtype=torch.int32), torch.tensor([1, 0.5, 1.0]), torch.tensor([0, 0, 0.3])
    cuda.top_k_top_p_min_p(wide[:, 3:-3], few, half, most)
    assert torch.equal(wide[:, :3], before[:, :3]) and torch.equal(wide[:, -3:], before[:, -3:])
    assert (wide[:, 3:-3].isfinite().sum(1) < 500).all()


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("head_dim, group", [(64, 1), (64, 12), (128, 4), (128, 8), (128, 16), (256, 2)])
def test_decode_gives_the_references_rows(dtype, head_dim, group):
    Problem([33, 1, 70], dtype, head_dim=head_dim, group=group).check()


@pytest.mark.parametrize("kv", KV_CODES)
@pytest.mark.parametrize(
    "dtype, head_dim, group", [(torch.bfloat16, 128, 5), (torch.float16, 128, 12), (torch.bfloat16, 256, 3)]
)
def test_decode_reads_8_bit_caches(kv, dtype, head_dim, group):
    scales = {"k_scale": 0.75, "v_scale": 1.5} if kv == "fp8_e4m3" else {}
    Problem([33, 1, 70], dtype, kv, head_dim, group, **scales).check()


@pytest.mark.parametrize("seq_len", [15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 2100])
def test_decode_crosses_borders_of_tiles_warps_and_segments(seq_len):
    Problem([seq_len], head_dim=64, group=2, block_size=32).check()


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 20},
        {"sliding_window": 1100},
        {"softcap": 2.0},
        {"sinks": torch.linspace(-2, 3, 4)},
        {"softcap": 5.0, "sinks": torch.linspace(-2, 3, 4), "sliding_window": 150},
    ],
    ids=lambda options: "-".join(options),
)
def test_decode_honours_windows_soft_caps_and_sinks(options):
    Problem([1100, 33, 2100], head_dim=64, group=2, **options).check()


def test_the_tokens_before_a_window_are_never_read():
    problem = Problem([300], head_dim=64, group=2, sliding_window=50)
    expected = problem.expected()
    behind = problem.table[0, : (300 - 50) // 16].clone()
    problem.cache[behind.long()] = 0xFF
    assert (problem.run().double() - expected).abs().max() < 8e-3


def test_a_row_has_the_same_bits_alone_and_in_a_batch_padded_for_longer_requests():
    together = Problem([1500, 40, 90], head_dim=64, group=2)
    alone = Problem([1500, 40, 90], head_dim=64, group=2)
    for name in ("seq_lens", "table", "q"):
        setattr(alone, name, getattr(together, name)[1:2])
    assert torch.equal(alone.run(max_segments=1), together.run(max_segments=4)[1:2])


@pytest.mark.parametrize(
    "dtype, kv, head_dim, group, options",
    [
        (torch.bfloat16, None, 64, 2, {}),
        (torch.float16, None, 128, 12, {"sliding_window": 2100, "sinks": torch.linspace(-2, 3, 24)}),
        (torch.bfloat16, "int8", 128, 2, {}),
    ],
)
def test_a_row_has_the_same_bits_whichever_thread_blocks_take_its_segments(
    dtype, kv, head_dim, group, options
):
    problem = Problem([4500, 1, 1025, 900, 3072], dtype, kv, head_dim, group, block_size=64, **options)
    each_its_own = problem.run()
    assert (each_its_own.double() - problem.expected()).abs().max() < TOLERANCE[dtype] + 8e-3 * (
        kv is not None
    )
    for num_parts in (1, 2, 3, 4):
        assert torch.equal(problem.run(num_parts=num_parts), each_its_own)
    assert torch.equal(problem.run(max_segments=40, num_parts=3), each_its_own)


def test_more_segments_than_are_loaded_at_once_are_merged():
    problem = Problem([17 * SEGMENT + 5], head_dim=64, group=1, block_size=64)
    assert torch.equal(problem.run(num_parts=2), problem.run())
    problem.check()


def test_the_blocks_of_a_launch_are_few_where_most_could_be_empty_and_enough_for_what_a_window_sees():
    assert cuda.choose_num_parts(8, 32, 128) == 32
    assert cuda.choose_num_parts(64 * 8, 32, 128) == 8
    assert cuda.choose_num_parts(512 * 8, 32, 128) == 2
    assert cuda.choose_num_parts(512 * 8, 1, 128) == 1
    assert cuda.choose_num_parts(512 * 8, 32, 256) == 32  # its kernel does not loop
    for window in (1, 2, 1024, 1025, 1026, 2050):
        most = max((n - 1) // SEGMENT - max(0, n - window) // SEGMENT + 1 for n in range(1, 5000))
        assert cuda.choose_num_parts(8, 32, 128, window) == most


def test_a_row_of_no_request_stays_as_it_is():
    problem = Problem([40, 90], head_dim=64, group=2)
    problem.seq_lens[1] = 0
    out = problem.run(max_segments=2)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


def test_a_nan_among_a_requests_keys_is_not_hidden():
    problem = Problem([40], kv="fp8_e4m3", group=2)
    problem.cache[problem.table[0, 0].long(), 0] = 0x7F
    assert problem.run().isnan().all()


def test_blocks_are_copied_in_every_layer_and_no_other_byte_is_touched():
    layers = torch.randint(0, 255, (2, 7, 5 * 48), dtype=torch.uint8)
    expected = layers.clone()
    pairs = torch.tensor([[0, 6], [3, 1]])
    expected[:, pairs[:, 1]] = layers[:, pairs[:, 0]]
    addresses = torch.tensor([layer.data_ptr() for layer in layers])
    library().emulated_copy_blocks(
        pointer(addresses), pointer(addresses), 2, pointer(pairs), len(pairs), ctypes.c_int64(layers.shape[2])
    )
    assert torch.equal(layers, expected)


def test_blocks_that_follow_one_another_are_copied_as_one_range():
    source, target = torch.zeros(9, 48, dtype=torch.uint8), torch.zeros(9, 48, dtype=torch.uint8)
    ranges = block_ranges(source, target, [(2, 5), (3, 6), (4, 8), (5, 9)])
    begin, to = source.data_ptr(), target.data_ptr()
    assert ranges == [(begin + 2 * 48, to + 5 * 48, 96), (begin + 4 * 48, to + 8 * 48, 96)]
