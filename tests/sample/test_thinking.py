"""`thinking_token_budget`: how long thinking may last, against a few lines that say it again."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from minivllm.sample.sampler import Sampler
from minivllm.sample.step import SampleBatch
from minivllm.sampling_params import SamplingParams, ThinkingTokens
from minivllm.utils.thinking import ThinkingTracker

VOCAB = 40
PROMPT = [1, 2, 3]


def generate(budget: int | None, marks: ThinkingTokens, *, num_tokens: int = 30, prior: Sequence[int] = (), **params):
    """What a model of random logits, the same for each position, says."""
    sampler = Sampler(VOCAB)
    asked = SamplingParams(temperature=0, thinking_token_budget=budget, thinking=marks, **params)
    sampler.add_request(0, asked, 0, [])
    table = np.zeros((1, 200), np.int32)
    tokens = [*PROMPT, *prior]
    while len(tokens) < len(PROMPT) + num_tokens:
        table[0, : len(tokens)] = tokens
        logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(len(tokens)))
        logits[0, [10, 11, 20, 21]] = -50  # it never thinks, nor stops, by itself
        batch = SampleBatch(np.array([0]), np.array([len(tokens)]), np.array([len(PROMPT)]), table)
        tokens.append(int(sampler(logits, batch).token_ids[0]))
    return tokens[len(PROMPT) :]


FREE = generate(None, ThinkingTokens([10], [20], is_open=True))


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("end", [[20], [20, 21], [20, 20, 21]])
def test_the_end_is_forced_once_the_budget_is_spent(budget: int, end: list[int]):
    marks = ThinkingTokens([10], end, is_open=True)
    got = generate(budget, marks)
    assert got[: budget + len(end)] == FREE[:budget] + end
    assert got[budget + len(end) :] == FREE[budget + len(end) :]


def test_what_looks_like_thinking_within_a_form_is_left_alone():
    form = {"structured_outputs": {"regex": "x"}}
    opened = generate(2, ThinkingTokens([10], [20], is_open=False), prior=[10], **form)
    assert opened == [10, *FREE[1:3], 20, *FREE[4:]]
    prior = [5, 10, 6, 6, 6]
    assert generate(2, ThinkingTokens([10], [20], is_open=False), prior=prior, **form) == prior + FREE[5:]
    prior = [7, 20, 10, 6, 6, 6]
    assert generate(2, ThinkingTokens([10], [20], is_open=True), prior=prior, **form) == prior + FREE[6:]


def test_an_answer_that_does_not_think_is_left_alone():
    assert generate(3, ThinkingTokens([10], [20], is_open=False)) == FREE


def test_thinking_that_the_answer_opens_counts_from_there_each_time():
    marks = ThinkingTokens([10], [20, 21], is_open=False)
    got = generate(2, marks, prior=[5, 10])
    assert got == [5, 10, *FREE[2:4], 20, 21, *FREE[6:]]
    again = generate(2, marks, prior=[5, 10, 6, 20, 21, 7, 10])
    assert again == [5, 10, 6, 20, 21, 7, 10, *FREE[7:9], 20, 21, *FREE[11:]]


@pytest.mark.parametrize("end", [[20], [20, 21]])
def test_an_answer_cut_anywhere_goes_on_the_same(end: list[int]):
    marks = ThinkingTokens([10], end, is_open=True)
    whole = generate(6, marks)
    assert all(generate(6, marks, prior=whole[:cut]) == whole for cut in range(len(whole)))


def test_the_end_is_forced_whatever_else_is_asked():
    marks = ThinkingTokens([], [20, 21], is_open=True)
    got = generate(2, marks, allowed_token_ids=[4, 5], bad_words_token_ids=[[20]], logit_bias={21: -90.0})
    assert got[2:4] == [20, 21] and set(got[:2] + got[4:]) <= {4, 5}


def test_the_tracker_finds_what_a_search_finds():
    pick = random.Random(3)
    for _ in range(300):
        start, end = pick.choice([[1], [1, 2]]), pick.choice([[3], [3, 3], [2, 3]])
        tracker, tokens = ThinkingTracker(start, end, is_open=False), []
        opened_at = None
        for _ in range(30):
            tokens.append(pick.randrange(4))
            tracker.follow(tokens[-1])
            if opened_at is None:
                opened_at = len(tokens) if tokens[-len(start) :] == start else None
            elif tokens[-len(end) :] == end:
                opened_at = None
            assert tracker.is_open == (opened_at is not None)
            assert not tracker.is_open or tracker.num_tokens == len(tokens) - opened_at
