"""`--quantization fp8`: the Triton kernel, interpreted, in a model on the device that is none; refused elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from make_random_model import make_model

import tests.gpu.interpreter  # noqa: F401  before the kernels
from minivllm.attention import registry
from minivllm.exceptions import ConfigError
from minivllm.ops.linear_fp8 import DenseFp8Linear
from minivllm.ops.op import Op, OpSpec
from minivllm.ops.triton.linear import TritonFp8Linear
from minivllm.sampling_params import SamplingParams
from tests.models.loop import Answer, Loop
from tests.worker.fake_device import FakeDevice

PROMPTS = [list(range(3, 3 + length)) for length in (33, 5, 1)]
PARAMS = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=0, logprobs=0, ignore_eos=True)
SIZES = {"max_num_seqs": 4, "max_model_len": 64, "max_num_batched_tokens": 40, "enforce_eager": True}
SELECT = Op.select


class DeviceWithFp8(FakeDevice):
    has_fp8 = True


def answers(model: Path, linear: type[DenseFp8Linear], monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    def select(op: Op, spec: OpSpec) -> Any:
        return partial(linear, device="cpu") if op.name == "fp8_linear" else SELECT(op, spec)

    monkeypatch.setattr(Op, "select", select)
    monkeypatch.setattr(registry, "_BACKENDS", ["tests.worker.fake_device:FakeDeviceBackend"])
    loop = Loop(model, platform=DeviceWithFp8(), quantization="fp8", **SIZES)
    assert loop.ready.numerics_id.endswith("-fp8")
    weights = loop.worker.runner.model.layers[0].self_attn.qkv_proj.packed
    assert type(weights) is linear and weights.tensors[0].itemsize == 1
    return loop.run(PROMPTS, PARAMS)


def mean_difference(some: list[Answer], others: list[Answer]) -> float:
    pairs = [
        (x[token], y[token])
        for a, b in zip(some, others)
        for x, y in zip(a.prompt_logprobs, b.prompt_logprobs)
        for token in x.keys() & y
    ]
    assert len(pairs) == sum(len(prompt) - 1 for prompt in PROMPTS)
    return sum(abs(x - y) for x, y in pairs) / len(pairs)


def test_a_model_on_the_kernel_is_that_of_the_specification_and_near_the_float_model(tmp_path: Path, monkeypatch):
    model = make_model(tmp_path, arch="qwen3", dtype="float32", seed=5, num_layers=1)  # its embeddings are tied
    exact = Loop(model).run(PROMPTS, PARAMS)
    specified = answers(model, DenseFp8Linear, monkeypatch)
    by_kernel = answers(model, TritonFp8Linear, monkeypatch)
    assert mean_difference(by_kernel, specified) < 1e-3
    assert 0 < mean_difference(by_kernel, exact) < 0.4  # three bits behind the first, of random weights
    assert all(len(answer.tokens) == 3 for answer in by_kernel)


@pytest.mark.parametrize("platform", [None, FakeDevice()], ids=["cpu", "older card"])
def test_it_is_refused_where_nothing_multiplies_8_bit_floats(tmp_path: Path, platform: FakeDevice | None):
    model = make_model(tmp_path, arch="llama", num_layers=1)
    with pytest.raises(ConfigError, match="--quantization fp8 needs a GPU .*; try --quantization int8"):
        Loop(model, platform=platform, quantization="fp8")
