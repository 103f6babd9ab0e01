"""The Triton backend through the interpreter: what a model's layers see of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import tests.gpu.interpreter  # noqa: F401  before the kernels
from minivllm.attention.backend import AttentionSpec, StepInputs
from minivllm.attention.backends.triton import TritonBackend
from minivllm.ops import cuda
from minivllm.ops.paged_attention import Options, reference
from minivllm.ops.rotary import HeadNorms, Turn
from minivllm.ops.triton.rotary import rotary
from tests.cuda.emulated import compiler, emulate
from tests.gpu.case import ints, max_diff, randn

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def spec(**changes) -> AttentionSpec:
    return AttentionSpec(**{**dict(num_heads=4, num_kv_heads=2, head_dim=32, block_size=16, dtype=torch.float32,
                                   device="cpu"), **changes})  # fmt: skip


def step_of(seq_lens: list[int], query_lens: list[int], **bounds) -> StepInputs:
    """Request b has blocks 8b + 1, 8b + 2, …"""
    table = torch.arange(8).int() + 1 + 8 * torch.arange(len(seq_lens)).int().unsqueeze(1)
    slots = [
        table[b, position // 16] * 16 + position % 16
        for b, (seq_len, query_len) in enumerate(zip(seq_lens, query_lens))
        for position in range(seq_len - query_len, seq_len)
    ]
    starts = ints("cpu", 0, *query_lens).cumsum(0, dtype=torch.int32)
    return StepInputs(starts, ints("cpu", *seq_lens), table, torch.stack(slots).long(), **bounds)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_chunks_then_decodes_see_what_was_written(kv_cache_dtype, batch_invariant):
    backend = TritonBackend(spec(kv_cache_dtype=kv_cache_dtype, batch_invariant=batch_invariant))
    cache = backend.new_kv_cache(32)
    cache.fill_(0xFF)
    for i, (seq_lens, query_lens) in enumerate([([20, 3], [20, 3]), ([21, 9], [1, 6]), ([22, 10], [1, 1])]):
        bounds = {} if i == 0 else {"max_query_len": max(query_lens), "max_seq_len": max(seq_lens)}
        step, options = step_of(seq_lens, query_lens, **bounds), Options(32**-0.5)
        qkv = randn("cpu", sum(query_lens), 8, 32, seed=i)
        got = backend.forward(
            *qkv.split([4, 2, 2], dim=1), cache, backend.build_metadata(step), options=options
        )
        expected = reference(
            qkv[:, :4], cache, step.block_table, step.seq_lens, step.query_start_loc,
            layout=backend.layout, options=options,
        )  # fmt: skip
        assert max_diff(got, expected) < 1e-5


class AsOnACard(TritonBackend):
    """Chooses as for a card, and computes here."""

    def _why_not_cuda(self) -> str | None:
        here, self.spec = self.spec, dataclasses.replace(self.spec, device="cuda")
        try:
            return super()._why_not_cuda()
        finally:
            self.spec = here


@pytest.mark.skipif(compiler() is None, reason="NOT RUN: there is no C++ compiler")
@pytest.mark.parametrize("kv_cache_dtype, head_dim", [("auto", 64), ("int8", 128)])
def test_decodes_and_only_decodes_are_the_cuda_kernels_where_it_is_built(
    kv_cache_dtype, head_dim, monkeypatch: pytest.MonkeyPatch
):
    emulate(monkeypatch)
    backend = AsOnACard(spec(kv_cache_dtype=kv_cache_dtype, head_dim=head_dim, dtype=torch.float16))
    assert backend.numerics_id == backend.layout_id + "-cuda_decode"
    bounds, decode = [], cuda.decode_attention

    def counted(*args, **options):
        bounds.append(options["max_seq_len"])
        return decode(*args, **options)

    monkeypatch.setattr(cuda, "decode_attention", counted)
    cache, options = backend.new_kv_cache(32).fill_(0xFF), Options(head_dim**-0.5)
    for i, (seq_lens, query_lens) in enumerate([([20, 3], [20, 3]), ([21, 9], [1, 6]), ([22, 10], [1, 1])]):
        step = step_of(seq_lens, query_lens, max_query_len=max(query_lens), max_seq_len=5000)
        qkv = randn("cpu", sum(query_lens), 8, head_dim, seed=i, dtype=torch.float16)
        got = backend.forward(
            *qkv.split([4, 2, 2], dim=1), cache, backend.build_metadata(step), options=options
        )
        expected = reference(
            qkv[:, :4], cache, step.block_table, step.seq_lens, step.query_start_loc,
            layout=backend.layout, options=options,
        )  # fmt: skip
        assert max_diff(got, expected) < 5e-3
    assert bounds == [5000]
    alibi = dataclasses.replace(options, alibi_slopes=torch.ones(4))
    backend.forward(*qkv.split([4, 2, 2], dim=1), cache, backend.build_metadata(step), options=alibi)
    assert bounds == [5000]


def test_why_decodes_are_tritons_is_known(monkeypatch: pytest.MonkeyPatch):
    emulate(monkeypatch)

    def reason(**changes) -> str | None:
        backend = AsOnACard(spec(**{"head_dim": 64, "dtype": torch.bfloat16, **changes}))
        assert backend.numerics_id.endswith("cuda_decode") == (backend._why_not_cuda() is None)
        return backend._why_not_cuda()

    assert reason() is None
    assert "batch invariant" in reason(batch_invariant=True)
    assert "cuda_decode_attention is off" in reason(cuda_decode=False)
    assert "no torch.float32 kernel" in reason(dtype=torch.float32)
    assert "head_dim 32" in reason(head_dim=32)
    monkeypatch.setattr(cuda, "extension", lambda: (None, "built without CUDA kernels"))
    assert "built without" in reason()
    assert TritonBackend(spec(head_dim=64))._why_not_cuda() == "needs CUDA, got cpu"


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_turned_and_written_in_one_launch_is_turned_then_written(kv_cache_dtype, has_norms):
    backend = TritonBackend(spec(kv_cache_dtype=kv_cache_dtype, dtype=torch.bfloat16))
    step = step_of([20, 3], [5, 3], max_query_len=5, max_seq_len=20)
    norms = HeadNorms(*(randn("cpu", 32, dtype=torch.bfloat16, seed=i) for i in range(2)), 1e-6) if has_norms else None
    turn = Turn(torch.tensor([15, 16, 17, 18, 19, 0, 1, 2]), randn("cpu", 24, 32), norms)
    results = []
    for turns in (True, False):
        q, k, v = randn("cpu", 8, 8, 32, dtype=torch.bfloat16).split([4, 2, 2], dim=1)
        cache, options = backend.new_kv_cache(32).zero_(), Options(32**-0.5)
        if turns:
            out = backend.turn_and_forward(turn, q, k, v, cache, backend.build_metadata(step), options=options)
        else:
            rotary(turn.positions, q, k, turn.cos_sin, turn.norms)
            out = backend.forward(q, k, v, cache, backend.build_metadata(step), options=options)
        results.append((out, q, k, cache))
    for one, two in zip(*results):
        assert torch.equal(one, two)


def test_a_block_is_one_range_of_bytes_and_its_layout_has_a_name():
    backend = TritonBackend(spec(kv_cache_dtype="int8", block_size=32))
    cache = backend.new_kv_cache(3)
    assert cache.is_contiguous() and cache[0].nbytes == backend.block_bytes == 2 * 2 * 32 * (32 + 4)
    assert backend.layout_id == "rows-int8-v1" != TritonBackend(spec()).layout_id


def test_what_the_kernels_do_not_serve_is_said():
    assert TritonBackend.why_not(spec()) == "needs CUDA, got cpu"
    cuda = {"device": "cuda"}
    assert TritonBackend.why_not(spec(**cuda)) is None
    assert "head_dim 300" in TritonBackend.why_not(spec(**cuda, head_dim=300))
    assert "block size 24" in TritonBackend.why_not(spec(**cuda, block_size=24))
    assert "4 heads cannot share 3" in TritonBackend.why_not(spec(**cuda, num_kv_heads=3))
    assert "no KV cache in fp4" in TritonBackend.why_not(spec(**cuda, kv_cache_dtype="fp4"))


def test_a_cpu_never_imports_triton():
    code = (
        "import sys, torch; from minivllm.attention.registry import select_backend;"
        "from minivllm.attention.backend import AttentionSpec;"
        "import minivllm.worker.worker;"
        "select_backend(AttentionSpec(4, 2, 32, 32, torch.float32, 'cpu'));"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
