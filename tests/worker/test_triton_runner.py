"""A model end to end by the Triton kernels, in their interpreter, under the runner as it serves a GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make_random_model import make_model

import tests.gpu.interpreter  # noqa: F401  before the kernels
from minivllm.attention import registry
from minivllm.attention.backends.triton import TritonBackend
from minivllm.ops import cuda
from minivllm.ops.op import Op, OpSpec
from minivllm.sampling_params import SamplingParams
from minivllm.worker.worker import Worker
from tests.cuda.emulated import compiler, emulate
from tests.models.loop import Loop, engine_config
from tests.worker.fake_device import FakeDevice

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PROMPTS = [[(i * 31 + length) % 490 for i in range(length)] for length in (30, 3, 17, 9)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
    SamplingParams(temperature=0.9, max_tokens=3, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, max_tokens=4, ignore_eos=True),
    SamplingParams(
        temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.4, allowed_token_ids=[3, 4, 5],
        bad_words_token_ids=[[3, 4]], logprobs=2, max_tokens=4, ignore_eos=True,
    ),
]  # fmt: skip


class InterpretedBackend(TritonBackend):
    @classmethod
    def why_not(cls, spec: Any) -> str | None:
        return None  # the device is a CPU, and the kernels are interpreted


class EmulatedBackend(InterpretedBackend):
    def _why_not_cuda(self) -> str | None:
        return None if self.spec.cuda_decode else "it is off"


def triton_or_reference(op: Op, spec: OpSpec) -> Any:
    for impl in op.implementations:
        if isinstance(impl.fn, str) and impl.fn.startswith("triton."):
            loaded = impl.load()
            return partial(loaded, device="cpu") if isinstance(loaded, type) else loaded
    return op.implementations[-1].load()


@pytest.mark.parametrize(("arch", "batch_invariant"), [("qwen3", False), ("gemma3", True)])
def test_its_tokens_are_the_cpus(
    arch: str, batch_invariant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(tmp_path, arch=arch, dtype="float32", seed=3, num_layers=1)
    expected = [answer.tokens for answer in Loop(model).run(PROMPTS, PARAMS)]
    monkeypatch.setattr(registry, "_BACKENDS", ["tests.worker.test_triton_runner:InterpretedBackend"])
    monkeypatch.setattr(Op, "select", triton_or_reference)
    platform = FakeDevice()
    sizes = {"block_size": 16, "max_num_batched_tokens": 24, "max_num_seqs": 3, "max_model_len": 64}
    sizes["cudagraph_capture_sizes"] = [1, 3]
    loop = Loop(model, platform=platform, plans_in_flight=2, batch_invariant=batch_invariant, **sizes)
    assert loop.ready.numerics_id.endswith("rows-float32-v1")
    assert [answer.tokens for answer in loop.run(PROMPTS, PARAMS)] == expected
    assert platform.graphs.num_replays > 2
    assert set(platform.graphs.num_rows) == {1, 3}


@pytest.mark.skipif(compiler() is None, reason="NOT RUN: there is no C++ compiler")
def test_its_captured_decodes_are_the_cuda_kernels_unless_they_are_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(tmp_path, arch="qwen3", dtype="float16", head_dim=64, seed=3, num_layers=1)
    monkeypatch.setattr(registry, "_BACKENDS", ["tests.worker.test_triton_runner:EmulatedBackend"])
    monkeypatch.setattr(Op, "select", triton_or_reference)
    emulate(monkeypatch)
    bounds, decode = [], cuda.decode_attention

    def counted(*args: Any, **options: Any) -> Any:
        bounds.append(options["max_seq_len"])
        return decode(*args, **options)

    monkeypatch.setattr(cuda, "decode_attention", counted)
    sizes = {"block_size": 16, "max_num_batched_tokens": 24, "max_num_seqs": 3, "max_model_len": 1100}
    sizes |= {"cudagraph_capture_sizes": [3], "num_gpu_blocks_override": 128}
    answers = []
    for is_cuda in (True, False):
        loop = Loop(model, platform=FakeDevice(), plans_in_flight=2, cuda_decode_attention=is_cuda, **sizes)
        assert loop.ready.numerics_id.endswith("cuda_decode") == is_cuda
        answers.append([answer.tokens for answer in loop.run(PROMPTS, PARAMS[0])])
        assert bool(bounds) == is_cuda and set(bounds) <= {1024, 1100}
        bounds.clear()
    assert answers[0] == answers[1]


def test_its_numerics_name_the_kernels_that_another_installation_may_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(tmp_path, arch="qwen3", dtype="float16", num_layers=1)

    def named(dtype: torch.dtype, **options: Any) -> str:
        platform = SimpleNamespace(device="cuda", is_host=False)
        return Worker(engine_config(model, **options), platform)._kernels_id(dtype)

    monkeypatch.setattr(cuda, "extension", lambda: (None, "built without CUDA kernels"))
    assert named(torch.bfloat16) == ""
    emulate(monkeypatch)
    assert named(torch.bfloat16) == "few_rows-cuda_truncation"
    assert named(torch.bfloat16, batch_invariant=True) == named(torch.float32) == "cuda_truncation"
