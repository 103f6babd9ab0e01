"""`--quantization int8`: near the float model in every family, half its memory, and whole in its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from make_random_model import make_model

from minivllm.sampling_params import SamplingParams
from tests.models.loop import Loop

PROMPTS = [list(range(3, 3 + length)) for length in (70, 33, 5, 1)]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama with biases": {"arch": "llama", "attention_bias": True, "tie_word_embeddings": False},
    "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3"},
    "gemma3": {"arch": "gemma3", "num_layers": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_near_those_of_the_float_model(tmp_path: Path, family: str):
    model = make_model(tmp_path, seed=5, dtype="bfloat16", **FAMILIES[family])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0)
    exact, quantized = Loop(model).run(PROMPTS, params), Loop(model, quantization="int8").run(PROMPTS, params)
    differences = [
        abs(x[token] - y[token])
        for a, b in zip(exact, quantized)
        for x, y in zip(a.prompt_logprobs, b.prompt_logprobs)
        for token in x.keys() & y
    ]
    assert len(differences) == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert sum(differences) <= 0.2 * len(differences)  # random weights are never sure of themselves


def test_weights_take_half_the_memory(tmp_path: Path):
    model = make_model(tmp_path, seed=5, dtype="bfloat16", arch="qwen3", hidden_size=256, intermediate_size=768)
    sizes = [
        sum(weight.num_bytes for weight in Loop(model, quantization=q).worker.runner.model.weights())
        for q in (None, "int8")
    ]
    assert 0.5 < sizes[1] / sizes[0] < 0.52


def test_it_is_part_of_a_resends_identity(tmp_path: Path):
    model = make_model(tmp_path, seed=5, arch="qwen3")
    plain, quantized = Loop(model).ready.numerics_id, Loop(model, quantization="int8").ready.numerics_id
    assert quantized == f"{plain}-int8"
