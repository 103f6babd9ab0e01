"""An answer that goes round in circles is ended, where it asked for that, and nowhere earlier."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.core.request import Request, ends_in_repetition
from minivllm.messages.engine import FinishReason
from minivllm.sampling_params import RepetitionDetectionParams
from tests.core.requests import EOS, make_request


def repeats(output: list[int], params: RepetitionDetectionParams) -> bool:
    """From the definition: the output ends in min_count times its own last so many tokens, for some size."""
    sizes = range(max(1, params.min_pattern_size), params.max_pattern_size + 1)
    text = "".join(map(chr, output))
    return any(
        text.endswith(text[-size:] * params.min_count) for size in sizes if len(text) >= size * params.min_count
    )


@settings(max_examples=500, deadline=None)
@given(
    prompt=st.lists(st.integers(60, 61), max_size=4),
    output=st.lists(st.integers(60, 62), min_size=1, max_size=24),
    sizes=st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted),
    min_count=st.integers(2, 5),
)
def test_repetition_is_found_where_the_definition_finds_it(prompt, output, sizes, min_count):
    params = RepetitionDetectionParams(sizes[1], sizes[0], min_count)
    assert ends_in_repetition(prompt + output, len(output), params) == repeats(output, params)


def answer(tokens: list[int], *, num_prior: int = 0, **params) -> tuple[int, FinishReason | None, int | str | None]:
    """Feed tokens until the request ends; how many there are then, and why."""
    request = Request.from_message(make_request(max_tokens=30, prior=tuple(tokens[:num_prior]), **params))
    for token in tokens[num_prior:]:
        request.append_output_tokens([token])
        if request.finished:
            break
    return request.num_output_tokens, request.finish_reason, request.stop_reason


TWICE = {"repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 2, "min_count": 2}}


@pytest.mark.parametrize("num_prior", [0, 3, 5])
def test_a_request_ends_with_its_second_equal_pattern_sent_whole_or_in_parts(num_prior: int):
    ended = (6, FinishReason.REPETITION, "repetition_detected")
    assert answer([7, 7, 5, 6, 5, 6, 9], num_prior=num_prior, **TWICE) == ended


def test_the_prompt_and_an_answer_that_did_not_ask_are_no_repetition():
    assert answer([5, 6, 7], prompt=[5, 6, 7], **TWICE) == (3, None, None)
    assert answer([5, 6, 5, 6, 5, 6]) == (6, None, None)


def test_min_tokens_come_first_and_an_end_token_before_repetition():
    assert answer([5, 6, 5, 6, 5, 6], min_tokens=6, **TWICE)[0] == 6
    assert answer([5, EOS, 5, EOS], eos=(EOS,), ignore_eos=True, **TWICE)[1] is FinishReason.REPETITION
    assert answer([5, 6, 5, 6], stop_token_ids=[6], **TWICE) == (2, FinishReason.STOP, 6)
