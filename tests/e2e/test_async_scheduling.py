"""Planning ahead changes nothing: tokens, text, logprobs and ends are those of an engine that waits, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, SamplingParams
from minivllm.attention import registry
from minivllm.outputs import RequestOutput
from tests.worker.fake_device import FakeDevice

REPETITION = {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 2}
# All that must see the true tokens, or ends an answer while a plan with the next token is in flight.
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": 3, "prompt_logprobs": 1},
    {"temperature": 0, "logprobs": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 1, "seed": 3, "stop": ["e", "to"]},
    {"temperature": 1, "seed": 4, "stop_token_ids": list(range(0, 512, 9)), "min_tokens": 5, "logprobs": 1},
    {"temperature": 0.7, "seed": 5, "top_p": 0.9, "bad_words": ["a", "th"], "logprobs": 2},
    {"temperature": 1, "seed": 6, "allowed_token_ids": list(range(60, 64)), "repetition_detection": REPETITION},
    {"temperature": 1, "seed": 7, "n": 3, "prompt_logprobs": 0, "min_p": 0.01},
    {"temperature": 1, "seed": 8, "extra_args": {"tokens": [70, 71, 72]}},
    {"temperature": 1, "seed": 9, "max_tokens": 1},
    {"temperature": 1, "seed": 10, "logprobs": 1, "structured_outputs": {"regex": "[a-z]{4,30}"}},
]


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    pick = random.Random(5)
    stem = [pick.randrange(300) for _ in range(200)]
    prompts = [stem[: pick.randrange(1, 200)] + [pick.randrange(300) for _ in range(9)] for _ in range(50)]
    params = [
        SamplingParams(**{"max_tokens": pick.choice([6, 20, 40])} | PARAMS[i % len(PARAMS)])
        for i in range(len(prompts))
    ]
    return prompts, params


def answers(model: Path, *, is_async: bool, **options: Any) -> list[tuple]:
    with LLM(
        str(model),
        async_scheduling=is_async,
        max_model_len=320,
        block_size=32,
        logits_processors=["tests.sample.processors:NthToken"],
        **options,
    ) as llm:
        outputs = llm.generate(*requests(), use_tqdm=False)
    return [shown(output) for output in outputs]


def shown(output: RequestOutput) -> tuple:
    return output.outputs, output.finished, output.prompt_logprobs, output.error


@pytest.mark.parametrize(
    "options",
    [{}, {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 70, "max_num_seqs": 16}],
    ids=["roomy", "tight"],
)
def test_async_scheduling_gives_the_answers_of_sync_scheduling(tiny_model: Path, options: dict[str, Any]):
    whole = answers(tiny_model, is_async=False, **options)
    assert answers(tiny_model, is_async=True, **options) == whole
    ends = {answer.finish_reason for answer, *_ in (outputs for outputs, *_ in whole)}
    assert ends == {"length", "stop", "repetition"}


def test_a_device_that_samples_by_itself_gives_the_cpus_answers(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever is asked of sampling, grammars too, through the whole engine: two plans in flight, preemption."""
    prompts, params = requests()
    sizes = {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 70, "max_num_seqs": 16}

    def run() -> list[tuple]:
        with LLM(
            str(tiny_model), disable_frontend_multiprocessing=True, max_model_len=320, block_size=32, **sizes
        ) as llm:
            assert llm.llm_engine.engine_core._core.executor.max_concurrent_batches == num_plans
            return [shown(output) for output in llm.generate(prompts[:30], params[:30], use_tqdm=False)]

    num_plans = 1
    expected = run()
    monkeypatch.setattr("minivllm.worker.worker.detect", lambda config: FakeDevice())
    monkeypatch.setattr(registry, "_BACKENDS", ["tests.worker.fake_device:FakeDeviceBackend"])
    num_plans = 2
    assert run() == expected
