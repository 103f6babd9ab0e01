"""`--quantization int4`: near the float model in every family, its matrices in half a byte a weight; on CPUs only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from make_random_model import make_model

from minivllm.exceptions import ConfigError
from minivllm.layers import linear as layers
from minivllm.ops.linear_int4 import DenseInt4Linear, PackedInt4Linear
from minivllm.ops.linear_int8 import PackedInt8Linear
from minivllm.ops.op import Impl, Op
from minivllm.sampling_params import SamplingParams
from tests.models.loop import Loop
from tests.worker.fake_device import FakeDevice

PROMPTS = [list(range(3, 3 + length)) for length in (70, 33, 5, 1)]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama with biases": {"arch": "llama", "attention_bias": True, "tie_word_embeddings": False},
    "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3"},
    "gemma3": {"arch": "gemma3", "num_layers": 3},
}
PARAMS = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, logprobs=0)


def mean_difference(answers: list[Any], exact: list[Any]) -> float:
    """Of the logprobs of the prompts' tokens."""
    differences = [
        abs(x[token] - y[token])
        for a, b in zip(answers, exact)
        for x, y in zip(a.prompt_logprobs, b.prompt_logprobs)
        for token in x.keys() & y
    ]
    assert len(differences) == sum(len(prompt) - 1 for prompt in PROMPTS)
    return sum(differences) / len(differences)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_off_by_about_ten_times_what_int8_is_off_by(tmp_path: Path, family: str):
    model = make_model(tmp_path, seed=5, dtype="bfloat16", **FAMILIES[family])
    exact, int8, int4 = (Loop(model, quantization=q).run(PROMPTS, PARAMS) for q in (None, "int8", "int4"))
    assert 3 < mean_difference(int4, exact) / mean_difference(int8, exact) < 14


def test_answers_have_the_bits_of_the_specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_model(tmp_path, seed=5, dtype="bfloat16", arch="qwen3")
    by_kernel = Loop(model, quantization="int4").run(PROMPTS, PARAMS)
    monkeypatch.setitem(layers._FORMATS, "int4", Op("int4_linear", [Impl(DenseInt4Linear)]))
    assert Loop(model, quantization="int4").run(PROMPTS, PARAMS) == by_kernel


def test_matrices_of_layers_take_a_quarter_of_the_memory_and_the_vocabulary_s_half(tmp_path: Path):
    model = make_model(tmp_path, seed=5, dtype="bfloat16", arch="qwen3", hidden_size=256, intermediate_size=768)
    decoder = Loop(model, quantization="int4").worker.runner.model
    exact = Loop(model).worker.runner.model
    assert type(decoder.lm_head.packed) is PackedInt8Linear
    for layer, before in zip(decoder.layers, exact.layers):
        assert type(layer.mlp.down_proj.packed) is PackedInt4Linear
        assert 0.25 < layer.mlp.down_proj.packed.nbytes / before.mlp.down_proj.packed.nbytes < 0.27


def test_it_is_part_of_a_resends_identity(tmp_path: Path):
    model = make_model(tmp_path, seed=5, arch="qwen3")
    plain, quantized = Loop(model).ready.numerics_id, Loop(model, quantization="int4").ready.numerics_id
    assert quantized == f"{plain}-int4"


def test_it_is_refused_on_a_device_that_is_no_cpu(tmp_path: Path):
    model = make_model(tmp_path, arch="llama", num_layers=1)
    with pytest.raises(ConfigError, match="--quantization int4 is there on CPUs only.*; try --quantization int8"):
        Loop(model, platform=FakeDevice(), quantization="int4")
