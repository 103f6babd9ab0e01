"""The rules of `SamplingParams`: what each field refuses, by name, before any model is asked."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from minivllm.exceptions import RequestError
from minivllm.messages.codec import Decoder, encode
from minivllm.sampling_params import SamplingParams


def nested(depth: int) -> dict:
    return {"a": nested(depth - 1)} if depth else {}


WRONG = [
    ({"n": 0}, "n"), ({"n": 16385}, "n"), ({"n": True}, "n"), ({"n": 2, "temperature": 0}, "n"),
    ({"presence_penalty": 2.1}, "presence_penalty"), ({"presence_penalty": math.nan}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"), ({"frequency_penalty": "1"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"repetition_penalty": 1e-45}, "repetition_penalty"),
    ({"repetition_penalty": math.inf}, "repetition_penalty"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_k": -2}, "top_k"), ({"top_k": 1.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"), ({"min_p": 1.1}, "min_p"), ({"seed": 2**63}, "seed"), ({"seed": "1"}, "seed"),
    ({"stop": [""]}, "stop"), ({"stop": ["a"] * 5}, "stop"), ({"stop": "a", "detokenize": False}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.0}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"), ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"logprobs": -2}, "logprobs"), ({"prompt_logprobs": -2}, "prompt_logprobs"),
    ({"stream_interval": 0}, "stream_interval"),
    ({"bad_words": [""]}, "bad_words"), ({"bad_words": [3]}, "bad_words"), ({"bad_words": ["a"] * 129}, "bad_words"),
    ({"logprob_token_ids": []}, "logprob_token_ids"), ({"logprob_token_ids": [-1]}, "logprob_token_ids"),
    ({"logprob_token_ids": [1] * 129}, "logprob_token_ids"), ({"logprob_token_ids": [1], "logprobs": 2}, "logprobs"),
    ({"repetition_detection": {"max_pattern_size": -1}}, "repetition_detection.max_pattern_size"),
    ({"repetition_detection": {"max_pattern_size": 1025, "min_count": 2}}, "repetition_detection.max_pattern_size"),
    ({"repetition_detection": {"min_pattern_size": 1}}, "repetition_detection.min_pattern_size"),
    ({"repetition_detection": {"max_pattern_size": 1, "min_count": 1}}, "repetition_detection.min_count"),
    ({"repetition_detection": {"max_pattern_size": "1"}}, "repetition_detection"),
    ({"repetition_detection": {"size": 1}}, "repetition_detection"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"spaces_between_special_tokens": 1}, "spaces_between_special_tokens"),
    ({"thinking_token_budget": -2}, "thinking_token_budget"),
    ({"extra_args": [1]}, "extra_args"), ({"extra_args": {"a": 2**63}}, "extra_args"),
    ({"extra_args": {"a": [object]}}, "extra_args"), ({"extra_args": {"a": {1: 2}}}, "extra_args"),
    ({"extra_args": nested(20)}, "extra_args"), ({"extra_args": {"a": ["\ud800"]}}, "extra_args"),
    ({"extra_args": {"\ud800": 1}}, "extra_args"), ({"bad_words": ["\ud800"]}, "bad_words"),
    ({"prompt_logprob_token_ids": []}, "prompt_logprob_token_ids"),
    ({"prompt_logprob_token_ids": [1, 2]}, "prompt_logprob_token_ids"),
    ({"prompt_logprob_token_ids": [[]]}, "prompt_logprob_token_ids"),
    ({"prompt_logprob_token_ids": [[1], [1, 2]]}, "prompt_logprob_token_ids"),
    ({"prompt_logprob_token_ids": [[1] * 129]}, "prompt_logprob_token_ids"),
    ({"prompt_logprob_token_ids": [[-2]]}, "prompt_logprob_token_ids"),
    ({"prompt_logprob_token_ids": [[1]], "prompt_logprob_start": -1}, "prompt_logprob_start"),
    ({"prompt_logprob_start": 1}, "prompt_logprob_start"),
    ({"flat_logprobs": 1}, "flat_logprobs"), ({"skip_reading_prefix_cache": 1}, "skip_reading_prefix_cache"),
    ({"skip_reading_prefix_cache": False, "prompt_logprobs": 1}, "skip_reading_prefix_cache"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "param"), WRONG, ids=str)
def test_a_value_outside_its_rule_is_refused_by_name(options: dict, param: str):
    with pytest.raises(RequestError) as refused:
        SamplingParams(**options)
    assert refused.value.param == param


def test_other_spellings_mean_the_same():
    params = SamplingParams(
        seed=-1, top_k=-1, logprobs=True, prompt_logprobs=True, stop="a", bad_words="b", thinking_token_budget=-1,
        stop_token_ids=[3, 3],
    )  # fmt: skip
    assert (params.seed, params.top_k, params.logprobs, params.prompt_logprobs) == (None, 0, 1, 1)
    assert (params.stop, params.bad_words, params.stop_token_ids) == (["a"], ["b"], [3])
    assert params.thinking_token_budget is None
    assert SamplingParams(logprob_token_ids=[5, 6]).logprobs == 2


def test_greedy_forgets_truncation_and_a_tiny_temperature_is_raised():
    greedy = SamplingParams(temperature=1e-6, top_p=0.5, top_k=3, min_p=0.2)
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.min_p) == (0, 1, 0, 0)
    assert SamplingParams(temperature=0.001).temperature == 0.01


def test_every_field_survives_the_way_to_the_core():
    params = SamplingParams(
        n=2, presence_penalty=0.5, seed=7, stop=["x"], bad_words=["y"], logprob_token_ids=[4],
        repetition_detection={"max_pattern_size": 4, "min_count": 3}, truncate_prompt_tokens=9,
        spaces_between_special_tokens=False, extra_args={"a": [1, None, 2.5, {"b": True}]},
        bad_words_token_ids=[[1, 2], [3]],
    )  # fmt: skip
    assert Decoder(SamplingParams)(encode(params)) == params
    assert msgspec.structs.asdict(params.clone())["repetition_detection"].min_count == 3


def test_the_table_of_fields_is_whole():
    table = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    rows = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    assert [name for name in SamplingParams.__struct_fields__ if f"`{name}`" not in rows] == []
