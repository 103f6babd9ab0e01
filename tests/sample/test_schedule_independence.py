"""Every sampling option through the real scheduler, worker and kernels: no crowd, preemption or resend changes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from minivllm.sampling_params import SamplingParams
from tests.models.loop import Answer, Loop

PROCESSORS = [f"tests.sample.processors:{name}" for name in ("NthToken", "Sharpen")]
OPTIONS = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.1, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    {"temperature": 0.8, "bad_words_token_ids": [[i] for i in range(0, 512, 3)] + [[i, i + 1] for i in range(500)]},
    {"temperature": 0.8, "logprob_token_ids": [1, 50, 99]},
    {"temperature": 0.7, "extra_args": {"tokens": [9, 8, 7, 6, 5]}},
    {"temperature": 0.3, "allowed_token_ids": [5, 6], "repetition_detection": {"max_pattern_size": 3, "min_count": 3}},
    {"temperature": 0.8, "logit_bias": {40: 5.0, 41: 6.0}, "min_tokens": 6, "stop_token_ids": [40]},
]
LENGTHS = [40, 3, 70, 33, 1, 90, 32, 64]


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    prompts = [[(7 * i + 13 * j) % 512 for j in range(length)] for i, length in enumerate(LENGTHS)]
    params = [
        SamplingParams(**{"max_tokens": 24, "logprobs": None if "logprob_token_ids" in each else 3, **each})
        for each in OPTIONS
    ]
    return prompts, params


def parts(answer: Answer) -> tuple:
    return answer.tokens, answer.logprobs, answer.ranks, answer.finish_reason, answer.error


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> list[Answer]:
    loop = Loop(tiny_model, logits_processors=PROCESSORS, enable_prefix_caching=False)
    return [
        loop.run([prompt], [params], seeds=[i])[0] for i, (prompt, params) in enumerate(zip(*requests()))
    ]


def test_the_options_have_their_effects(alone: list[Answer]):
    assert alone[5].tokens[:6] == [9, 8, 7, 6, 5, 5]
    assert alone[6].finish_reason == "repetition"
    assert alone[7].finish_reason == "stop" and len(alone[7].tokens) > 6 and alone[7].tokens[-1] == 40
    tokens = alone[3].tokens
    assert all(token % 3 or token >= 512 for token in tokens)
    assert all(second != first + 1 for first, second in zip(tokens, tokens[1:]) if first < 500)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 24, "max_num_seqs": 8},
        {"num_gpu_blocks_override": 8},
        {"max_num_seqs": 2, "max_num_batched_tokens": 48},
    ],
    ids=["together", "chunked", "preempted", "two by two"],
)
@pytest.mark.parametrize("stagger", [0, 2])
def test_a_crowd_changes_no_bit(tiny_model: Path, alone: list[Answer], options: dict, stagger: int):
    loop = Loop(tiny_model, logits_processors=PROCESSORS, **options)
    prompts, params = requests()
    crowd = loop.run(prompts, params, seeds=list(range(len(prompts))), stagger=stagger)
    assert [parts(answer) for answer in crowd] == [parts(answer) for answer in alone]
    if "num_gpu_blocks_override" in options and not stagger:
        assert loop.num_preemptions > 0


def test_a_resend_goes_on_as_if_nothing_had_been(tiny_model: Path, alone: list[Answer]):
    loop = Loop(tiny_model, logits_processors=PROCESSORS)
    prompts, params = requests()
    for cut in (1, 2, 5, 8):
        prior = [answer.tokens[: min(cut, len(answer.tokens) - 1)] for answer in alone]
        resent = loop.run(prompts, params, seeds=list(range(len(prompts))), prior=prior)
        for whole, begun, rest in zip(alone, prior, resent):
            done = len(begun)
            assert parts(rest) == (
                whole.tokens[done:], whole.logprobs[done:], whole.ranks[done:], whole.finish_reason, whole.error
            )  # fmt: skip
