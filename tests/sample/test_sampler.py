"""Each step of the sampler against a plain reference, their order, and that a row is its request's alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from minivllm.ops.sampling import gumbel_noise
from minivllm.sample.sampler import NONFINITE, Sampler, SamplerOutput
from minivllm.sample.step import GrammarMask, SampleBatch
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams

VOCAB = 97
INF = float("inf")


@dataclass
class Asking:
    """A request as the sampler meets it."""

    params: SamplingParams
    prompt: list[int] = field(default_factory=lambda: [1, 2, 3])
    output: list[int] = field(default_factory=list)
    seed: int = 0
    eos: list[int] = field(default_factory=list)


def sample(logits: torch.Tensor, *requests: Asking, mode: str = "raw_logprobs") -> SamplerOutput:
    sampler = Sampler(logits.shape[1], mode)
    rows = [5 * i + 2 for i in range(len(requests))]  # any rows, in any order
    for row, request in zip(rows, requests):
        sampler.add_request(row, request.params, request.seed, request.eos)
    return sampler(logits.clone(), batch_of(requests, rows))


def batch_of(requests: tuple[Asking, ...] | list[Asking], rows: list[int]) -> SampleBatch:
    token_ids = np.zeros((max(rows) + 1, 64), np.int32)
    for row, request in zip(rows, requests):
        tokens = request.prompt + request.output
        token_ids[row, : len(tokens)] = tokens
    return SampleBatch(
        rows=np.array(rows),
        num_tokens=np.array([len(request.prompt) + len(request.output) for request in requests]),
        num_prompt_tokens=np.array([len(request.prompt) for request in requests]),
        token_ids=token_ids,
    )


def random_logits(num_rows: int = 1, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def processed(logits: torch.Tensor, request: Asking) -> list[float]:
    """What the sampler made of a row of logits, -inf where masked, by token."""
    params = request.params.clone(logprobs=-1)
    asking = Asking(params, request.prompt, request.output, request.seed, request.eos)
    lists = sample(logits, asking, mode="processed_logits").logprobs[0]
    by_token = dict(zip(lists.token_ids[0], lists.logprobs[0]))
    return [by_token[token] for token in range(logits.shape[1])]


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=None, **options)


# Choosing --------------------------------------------------------------------


def test_greedy_takes_the_largest_and_the_lowest_index_on_ties():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [0.0, -1.0, -2.0, -3.0]])
    assert sample(logits, Asking(greedy()), Asking(greedy())).token_ids.tolist() == [1, 0]


@pytest.mark.parametrize("seed", [0, 12345, 2**63, 2**64 - 1])
def test_a_sampled_token_is_the_argmax_of_scaled_logits_plus_the_noise_of_seed_and_position(seed: int):
    logits = random_logits()
    for output in ([], [7], [7, 8, 9]):
        request = Asking(SamplingParams(temperature=0.7), output=output, seed=seed)
        signed = seed - 2**64 if seed >= 2**63 else seed
        noise = gumbel_noise(torch.tensor([signed]), torch.tensor([3 + len(output)]), VOCAB)
        assert sample(logits, request).token_ids[0] == (logits / 0.7 + noise).argmax()


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(4000, 4)
    requests = [Asking(SamplingParams(temperature=0.5), seed=seed) for seed in range(4000)]
    counts = np.bincount(sample(logits, *requests).token_ids, minlength=4) / 4000
    expected = torch.softmax(logits[0] / 0.5, 0).numpy()
    assert np.abs(counts - expected).max() < 0.03  # four deviations


# Constraints -----------------------------------------------------------------


def test_only_allowed_tokens_are_left():
    logits = random_logits()
    kept = processed(logits, Asking(greedy(allowed_token_ids=[3, 50, 3, VOCAB + 5])))
    assert kept == [logits[0, i].item() if i in (3, 50) else -INF for i in range(VOCAB)]


def forbidden(bad_words: list[list[int]], output: list[int]) -> set[int]:
    """Every token after which the output would end in a bad word, found by trying each."""
    return {
        token
        for token in range(VOCAB)
        for word in bad_words
        if (output + [token])[-len(word) :] == word and len(output) + 1 >= len(word)
    }


@pytest.mark.parametrize("output", [[], [4], [5, 4], [4, 5], [9, 4, 5], [3, 3], [3]])
def test_no_token_completes_a_bad_word(output: list[int]):
    bad_words = [[7], [4, 5], [4, 5, 6], [5, 9], [3, 3, 3], [1, 2, 3, 4]]
    logits = random_logits()
    # The prompt ends in a beginning of [1, 2, 3, 4]: only what is generated counts.
    kept = processed(logits, Asking(greedy(bad_words_token_ids=bad_words), prompt=[1, 2, 3], output=output))
    assert {i for i, value in enumerate(kept) if value == -INF} == forbidden(bad_words, output)
    assert all(value in (-INF, logits[0, i].item()) for i, value in enumerate(kept))


def test_no_end_token_before_min_tokens():
    logits = random_logits()
    params = greedy(min_tokens=2, stop_token_ids=[11])
    for output in ([], [4], [4, 4]):
        kept = processed(logits, Asking(params, output=output, eos=[9, 10]))
        masked = {i for i, value in enumerate(kept) if value == -INF}
        assert masked == ({9, 10, 11} if len(output) < 2 else set())


def test_a_bias_is_added():
    logits = random_logits()
    kept = processed(logits, Asking(greedy(logit_bias={4: 2.5, 9: -100.0})))
    expected = logits[0].clone()
    expected[4] += 2.5
    expected[9] -= 100.0
    assert kept == expected.tolist()


# Penalties -------------------------------------------------------------------


def penalised(logits: list[float], request: Asking) -> list[float]:
    """Token by token, from the definitions."""
    params, counts = request.params, Counter(request.output)
    result = []
    for token, value in enumerate(logits):
        if token in request.prompt or token in request.output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * counts[token]
        value -= params.presence_penalty * (counts[token] > 0)
        result.append(value)
    return result


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"frequency_penalty": 0.4},
    {"presence_penalty": -0.7},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.9},
]


@pytest.mark.parametrize("options", PENALTIES, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("output", [[], [5], [5, 2, 5, 80, 5]])
def test_penalties_are_those_of_their_definitions(options: dict, output: list[int]):
    logits = random_logits()
    request = Asking(greedy(**options), prompt=[2, 2, 7], output=output)
    assert processed(logits, request) == pytest.approx(penalised(logits[0].tolist(), request), abs=1e-5)


def test_counts_kept_up_over_steps_give_the_bits_of_counts_made_anew():
    params = greedy(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.9, logprobs=-1)
    growing = Sampler(VOCAB, "processed_logits")
    growing.add_request(0, params, 0, [])
    output: list[int] = []
    for step in range(8):
        request = Asking(params, output=list(output))
        logits = random_logits(seed=step)
        kept_up = growing(logits.clone(), batch_of([request], [0]))
        anew = sample(logits, request, mode="processed_logits")
        assert kept_up.logprobs == anew.logprobs
        output.append(int(kept_up.token_ids[0]) if step % 3 else 5)


def test_a_row_that_is_given_away_starts_anew():
    sampler = Sampler(VOCAB, "processed_logits")
    sampler.add_request(0, greedy(presence_penalty=2.0, allowed_token_ids=[1], min_tokens=3), 0, [4])
    sampler(random_logits(), batch_of([Asking(greedy(), output=[1])], [0]))
    sampler.remove_request(0)
    sampler.add_request(0, greedy(logprobs=0), 0, [])
    logits = random_logits(seed=1)
    again = sampler(logits.clone(), batch_of([Asking(greedy())], [0]))
    assert again.logprobs[0].logprobs == [[logits.max().item()]]


# Truncation ------------------------------------------------------------------


def survivors(logits: list[float], params: SamplingParams) -> set[int]:
    """min_p, then top-k, then top-p, over logits / temperature, in double precision."""
    scaled = [value / params.temperature for value in logits]
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    weight = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    order = [i for i in order if weight[i] >= params.min_p]
    if params.top_k:
        order = order[: params.top_k]
    total, reached, kept = sum(weight[i] for i in order), 0.0, []
    for i in order:
        if kept and params.top_p < 1 and reached >= params.top_p * total:
            break
        kept.append(i)
        reached += weight[i]
    return set(kept)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"min_p": 0.02, "top_k": 12, "top_p": 0.7},
        {"top_p": 1e-6},
        {"top_k": 1000},
    ],
    ids=lambda options: "-".join(options),
)
def test_truncation_keeps_what_its_definitions_keep(options: dict):
    for seed in range(5):
        logits = random_logits(seed=seed)
        params = SamplingParams(temperature=0.6, max_tokens=None, **options)
        kept = processed(logits, Asking(params))
        expected = survivors(logits[0].tolist(), params)
        assert {i for i, value in enumerate(kept) if value > -INF} == expected
        assert all(kept[i] == pytest.approx(logits[0, i].item() / 0.6, rel=1e-6) for i in expected)


def test_truncation_comes_after_bias_and_penalties():
    logits = torch.zeros(1, 4)
    params = SamplingParams(
        temperature=1, top_k=1, max_tokens=None, logit_bias={2: 3.0, 1: 2.0}, presence_penalty=2.0
    )
    assert sample(logits, Asking(params, output=[2])).token_ids.tolist() == [1]


# Logprobs --------------------------------------------------------------------


def test_raw_logprobs_are_those_of_the_model_whatever_the_request_asks():
    logits = random_logits()
    params = SamplingParams(
        temperature=0.3, top_k=2, logit_bias={5: 50.0}, presence_penalty=1.0, logprobs=3, max_tokens=None
    )
    output = sample(logits, Asking(params))
    lists = output.logprobs[0]
    expected = torch.log_softmax(logits[0], 0)
    assert output.token_ids.tolist() == [5]
    assert lists.token_ids[0] == [5, *expected.topk(3).indices.tolist()]
    assert lists.logprobs[0] == pytest.approx([expected[i].item() for i in lists.token_ids[0]], abs=1e-5)
    assert lists.ranks == [int((expected > expected[5]).sum()) + 1]


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits", "processed_logprobs"])
def test_each_logprobs_mode_reports_its_own_numbers(mode: str):
    logits = random_logits()
    params = SamplingParams(temperature=0.5, top_k=4, logit_bias={5: 1.0}, logprobs=VOCAB, max_tokens=None)
    lists = sample(logits, Asking(params), mode=mode).logprobs[0]
    reported = dict(zip(lists.token_ids[0], lists.logprobs[0]))
    expected = logits[0].clone()
    if mode.startswith("processed"):
        expected[5] += 1.0
        expected /= 0.5
        expected[expected < expected.topk(4).values[-1]] = -INF
    if mode.endswith("logprobs"):
        expected = torch.log_softmax(expected, 0)
    assert [reported[i] for i in range(VOCAB)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_only_those_who_ask_get_logprobs_and_as_many_as_they_ask():
    requests = [Asking(greedy(logprobs=n)) for n in (None, 0, 2, -1, 10**6)]
    lists = sample(random_logits(5), *requests).logprobs
    assert {i: len(found.token_ids[0]) for i, found in lists.items()} == {
        1: 1,
        2: 3,
        3: VOCAB + 1,
        4: VOCAB + 1,
    }
    assert all(found.ranks == [1] for found in lists.values())


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
def test_logprobs_of_the_tokens_asked_for_take_the_place_of_the_most_likely(mode: str):
    logits = random_logits(2)
    params = greedy(logprob_token_ids=[40, 3, 77], logit_bias={40: 1.5})
    lists = sample(logits, Asking(params), Asking(greedy(logprobs=2)), mode=mode).logprobs
    assert lists[0].token_ids[0][1:] == [40, 3, 77] and len(lists[1].token_ids[0]) == 3
    expected = torch.log_softmax(logits[0], 0)
    if mode == "processed_logits":
        expected = logits[0] + torch.nn.functional.one_hot(torch.tensor(40), VOCAB) * 1.5
    own = lists[0].token_ids[0][0]
    assert lists[0].logprobs[0] == pytest.approx([expected[i].item() for i in (own, 40, 3, 77)], abs=1e-5)
    assert lists[0].ranks == [int((expected >= expected[own]).sum())]


# Independence and failure ----------------------------------------------------


def a_mixed_crowd() -> list[Asking]:
    options = [
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.3},
        {"temperature": 0.9, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"temperature": 0.7, "frequency_penalty": 0.5, "logit_bias": {3: 2.0}},
        {"temperature": 1.0, "allowed_token_ids": [1, 2, 3, 4]},
        {"temperature": 0.7, "min_tokens": 9, "stop_token_ids": [6]},
        {"temperature": 0.7, "bad_words_token_ids": [[3, 8, 8, 6], [8, 7]]},
        {"temperature": 0.7, "logprob_token_ids": [1, 5, 9, 13]},
    ]
    return [
        Asking(SamplingParams(**chosen, max_tokens=None, logprobs=4), output=[3, i, i], seed=i)
        for i, chosen in enumerate(options)
    ]


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_a_request_gets_the_same_bits_in_a_crowd_and_alone(mode: str):
    crowd = a_mixed_crowd()
    logits = random_logits(len(crowd))
    together = sample(logits, *crowd, mode=mode)
    for i, request in enumerate(crowd):
        alone = sample(logits[i : i + 1], request, mode=mode)
        assert together.token_ids[i] == alone.token_ids[0]
        assert together.logprobs[i] == alone.logprobs[0]


@pytest.mark.parametrize("poison", [float("nan"), INF])
def test_a_row_that_is_not_finite_fails_and_its_neighbours_do_not_notice(poison: float):
    crowd = a_mixed_crowd()
    logits = random_logits(len(crowd))
    healthy = sample(logits, *crowd)
    logits[2, 40] = poison
    broken = sample(logits, *crowd)
    assert broken.failed == {2: NONFINITE}
    for i in set(range(len(crowd))) - {2}:
        assert broken.token_ids[i] == healthy.token_ids[i]
        assert broken.logprobs[i] == healthy.logprobs[i]


def test_a_row_of_nothing_but_minus_infinity_fails():
    assert sample(torch.full((1, VOCAB), -INF), Asking(greedy())).failed == {0: NONFINITE}


@pytest.mark.parametrize(
    ("options", "allowed_by_grammar", "names"),
    [
        ({"allowed_token_ids": [9], "min_tokens": 1}, None, ["allowed_token_ids", "min_tokens"]),
        ({"allowed_token_ids": [9]}, [8], ["response_format", "allowed_token_ids"]),
        ({"bad_words_token_ids": [[8]], "logit_bias": {3: 1.0}}, [8], ["response_format", "bad_words"]),
        ({"min_tokens": 1}, [9], ["response_format", "min_tokens"]),
        ({"logit_bias": {8: -1e30}}, [], ["response_format"]),
        ({"bad_words_token_ids": [[i] for i in range(VOCAB)]}, None, ["bad_words"]),
    ],
)
def test_constraints_that_leave_no_token_fail_their_request_only_and_are_named(
    options: dict, allowed_by_grammar: list[int] | None, names: list[str]
):
    requests = [Asking(greedy(logprobs=2), eos=[9]), Asking(greedy(**options), eos=[9])]
    sampler = Sampler(VOCAB)
    grammar = None
    if allowed_by_grammar is not None:
        form = StructuredOutputsParams(regex="x", param="response_format")
        requests[1].params = requests[1].params.clone(structured_outputs=form)
        bits = np.zeros((1, 32 * -(-VOCAB // 32)), np.uint8)
        bits[0, allowed_by_grammar] = 1
        grammar = GrammarMask(np.array([1]), np.packbits(bits, axis=1, bitorder="little").view(np.uint32))
    for row, request in enumerate(requests):
        sampler.add_request(row, request.params, 0, request.eos)
    logits = random_logits(2)
    output = sampler(logits.clone(), batch_of(requests, [0, 1]), grammar)
    assert set(output.failed) == {1} and output.fields_at_fault == {1: names[0]}
    assert output.failed[1].startswith(" and ".join(names) + " ")
    alone = sample(logits[:1], requests[0])
    assert (output.token_ids[0], output.logprobs[0]) == (alone.token_ids[0], alone.logprobs[0])


def test_the_largest_bias_stays_finite_through_penalties_and_temperature():
    bias = {i: -1e30 if i % 2 else 1e30 for i in range(VOCAB)}
    params = SamplingParams(temperature=0.01, repetition_penalty=1e6, frequency_penalty=2.0, logit_bias=bias)
    output = sample(random_logits(), Asking(params, output=[4, 5]))
    assert output.failed == {} and output.token_ids[0] % 2 == 0
