"""Logprobs of prompts and flat ones, end to end on a real model: all ways to ask agree with asking for everything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from minivllm import LLM, SamplingParams
from minivllm.exceptions import RequestError
from minivllm.outputs import FlatLogprobs, Logprob, RequestOutput

PROMPT = [3 + (7 * i) % 200 for i in range(83)]
NAMED = [[(5 * i) % 200, (11 * i) % 200] for i in range(len(PROMPT) - 1)]
CHUNK = 16  # tokens a step: the prompt takes six


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    options = dict(max_model_len=256, max_logprobs=-1, max_num_batched_tokens=CHUNK, max_num_seqs=4, block_size=32)
    with LLM(tiny_model, **options, num_gpu_blocks_override=32, disable_frontend_multiprocessing=True) as llm:
        yield llm


def ask(llm: LLM, prompt: list[int] = PROMPT, **params) -> RequestOutput:
    params = {"max_tokens": 3, "temperature": 0, "ignore_eos": True} | params
    [output] = llm.generate([prompt], SamplingParams(**params), use_tqdm=False)
    return output


@pytest.fixture(scope="module")
def everything(llm: LLM) -> RequestOutput:
    return ask(llm, prompt_logprobs=-1, logprobs=4)


@pytest.mark.parametrize("start", [None, 0, 1, CHUNK - 1, CHUNK, CHUNK + 1, len(PROMPT) - 2])
def test_tokens_named_by_position_get_their_logprobs(llm: LLM, everything: RequestOutput, start: int | None):
    first = start or 0
    output = ask(llm, prompt_logprob_token_ids=NAMED[first:], prompt_logprob_start=start)
    wanted = [[everything.prompt_logprobs[i + 1][token].logprob for token in NAMED[i]] for i in range(len(NAMED))]
    assert output.prompt_token_id_logprobs == wanted[first:]
    assert output.prompt_logprobs is None


def test_they_come_beside_the_likeliest_and_leave_those_alone(llm: LLM, everything: RequestOutput):
    plain = ask(llm, prompt_logprobs=2)
    both = ask(llm, prompt_logprobs=2, prompt_logprob_token_ids=NAMED)
    assert both.prompt_logprobs == plain.prompt_logprobs
    assert plain.prompt_token_id_logprobs is None
    assert both.prompt_token_id_logprobs[7][0] == everything.prompt_logprobs[8][NAMED[7][0]].logprob


def test_no_token_is_minus_infinity(llm: LLM):
    named = [[token, -1] for token, _ in NAMED]
    output = ask(llm, prompt_logprob_token_ids=named)
    assert all(row[1] == -math.inf < row[0] for row in output.prompt_token_id_logprobs)


@pytest.mark.parametrize("start, num_rows", [(0, len(NAMED) - 1), (1, len(NAMED)), (len(NAMED), 1)])
def test_rows_that_do_not_fit_the_prompt_are_refused(llm: LLM, start: int, num_rows: int):
    with pytest.raises(RequestError, match="rows; a prompt of 83 tokens") as refused:
        ask(llm, prompt_logprob_token_ids=NAMED[:num_rows], prompt_logprob_start=start)
    assert refused.value.param == "prompt_logprob_token_ids"


def test_a_named_token_outside_the_vocabulary_is_refused(llm: LLM):
    with pytest.raises(RequestError, match="no token id of a vocabulary"):
        ask(llm, prompt_logprob_token_ids=[[2**31 - 1]] * len(NAMED))


def test_flat_logprobs_read_like_the_list(llm: LLM, everything: RequestOutput):
    flat = ask(llm, prompt_logprobs=-1, logprobs=4, flat_logprobs=True)
    assert isinstance(flat.prompt_logprobs, FlatLogprobs) and isinstance(flat.outputs[0].logprobs, FlatLogprobs)
    assert list(flat.outputs[0].logprobs) == everything.outputs[0].logprobs
    assert list(flat.prompt_logprobs)[1:] == everything.prompt_logprobs[1:]
    assert flat.prompt_logprobs[0] == {}  # nothing predicts it
    assert flat.outputs[0].cumulative_logprob == everything.outputs[0].cumulative_logprob


def test_a_slice_and_a_sum_of_flat_logprobs_are_flat():
    rows = [{i: Logprob(-i, 1, str(i)), i + 9: Logprob(-9.0)} for i in range(4)]
    flat = FlatLogprobs()
    flat.extend(rows)
    assert (list(flat[1:3]), list(flat[-1:]), list(flat[::2])) == (rows[1:3], rows[-1:], rows[::2])
    assert list(flat[:2] + flat[2:]) == list(flat) == rows
    assert (flat[-1], len(flat), len(flat[4:])) == (rows[-1], 4, 0)


def test_a_request_may_decline_the_prefix_cache(llm: LLM):
    prompt = [token + 1 for token in PROMPT]
    first, again = ask(llm, prompt), ask(llm, prompt)
    declined = ask(llm, prompt, skip_reading_prefix_cache=True)
    assert (first.num_cached_tokens, again.num_cached_tokens, declined.num_cached_tokens) == (0, 64, 0)
    assert declined.outputs[0].token_ids == first.outputs[0].token_ids
