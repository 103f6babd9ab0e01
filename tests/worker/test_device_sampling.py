"""Sampling on a device gives what sampling on the host gives, to the bit, without one look at what is on the device."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from minivllm.messages.engine import LogprobsLists
from minivllm.ops.op import Op
from minivllm.sample.sampler import Sampler, SamplerOutput
from minivllm.sample.step import GrammarMask, SampleBatch
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams, ThinkingTokens
from minivllm.worker.buffers import Staging
from minivllm.worker.device_sampling import DeviceSampling
from minivllm.worker.request_state import RequestTable
from tests.worker.fake_device import FakeDevice, HostRead, OnDevice, on_device, strict_ops

VOCAB, MOST_ROWS = 97, 32
MARKS = ThinkingTokens([10], [20, 21], is_open=True)
EOS = [9]
ASKED = [
    {"temperature": 0},
    {"temperature": 1.3},
    {"temperature": 0.9, "top_p": 0.8, "min_p": 0.01, "top_k": 20},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"frequency_penalty": 0.5, "presence_penalty": -0.3, "logit_bias": {3: 2.0, 200: 1.0}},
    {"allowed_token_ids": [1, 2, 3, 4, 96]},
    {"min_tokens": 9, "stop_token_ids": [6]},
    {"bad_words_token_ids": [[3, 8, 8, 6], [8, 7], [5]], "repetition_penalty": 0.8},
    {"bad_words_token_ids": [[8, 7]], "temperature": 0},
    {"logprob_token_ids": [1, 5, 9, 13]},
    {"thinking_token_budget": 4, "thinking": MARKS},
    {"thinking_token_budget": 2, "thinking": MARKS},
    {"structured_outputs": StructuredOutputsParams(regex="x")},
    {"structured_outputs": StructuredOutputsParams(regex="y"), "allowed_token_ids": [*range(20, 60)], "top_k": 2},
]


@pytest.fixture(autouse=True)
def ops_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Op, "select", strict_ops(Op.select))


class Side:
    """A sampler with these requests in rows of a table: the host's, or the device's before it."""

    def __init__(self, requests: list[SamplingParams], mode: str) -> None:
        self.rows = np.array([(5 * i + 2) % 64 for i in range(len(requests))])
        self.sampler = Sampler(VOCAB, mode)
        for i, (row, params) in enumerate(zip(self.rows.tolist(), requests)):
            self.sampler.add_request(row, params, i, EOS)

    def batch(self, tokens: list[list[int]], num_prompt: int) -> SampleBatch:
        table = np.zeros((64, 64), np.int32)
        for row, own in zip(self.rows, tokens):
            table[row, : len(own)] = own
        lengths = np.array([len(own) for own in tokens])
        return SampleBatch(self.rows, lengths, np.full(len(tokens), num_prompt), table)


class OnHost(Side):
    def __init__(self, requests: list[SamplingParams], mode: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Op, "select", lambda op, spec: PLAIN_SELECT(op, spec))
            super().__init__(requests, mode)

    def sample(self, logits, tokens, num_prompt, grammar=None) -> SamplerOutput:
        return self.sampler(logits.clone(), self.batch(tokens, num_prompt), grammar)


PLAIN_SELECT = Op.select


class OnTheDevice(Side):
    def __init__(self, requests: list[SamplingParams], mode: str) -> None:
        super().__init__(requests, mode)
        platform = FakeDevice()
        self.staging = Staging(platform)
        self.sampling = DeviceSampling(self.sampler, platform, self.staging, VOCAB, MOST_ROWS)
        self.sampling._last = on_device(self.sampling._last)

    def sample(self, logits, tokens, num_prompt, grammar=None) -> SamplerOutput:
        batch, sampling = self.batch(tokens, num_prompt), self.sampling
        for row, length in zip(batch.rows, batch.num_tokens):
            batch.token_ids[row, length - 1] = 55  # the host does not know the last token
        last_ids = on_device(torch.tensor([own[-1] for own in tokens]))
        self.staging.begin()
        inputs = sampling.inputs(batch.rows, batch.num_tokens, len(tokens))
        given = on_device(logits.clone())
        drawn = sampling.draw(given, inputs)
        self.staging.end()
        pending = sampling.sample(given, drawn, inputs, batch, last_ids, grammar)
        after = given.as_subclass(torch.Tensor)
        assert torch.equal(after.view(torch.int32), logits.view(torch.int32)), "logits stay as they are"
        sampling.absorb(RequestTable(64, 64, 16), all_of_it=True)
        return sampling.output(pending)


def everybody(**more) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=None, **each, **more) for each in ASKED]


def masks(*columns: int, seed: int = 0) -> GrammarMask:
    words = np.random.default_rng(seed).integers(0, 1 << 32, (len(columns), 5), dtype=np.uint32)
    return GrammarMask(np.array(columns), words)


def assert_same(ours: SamplerOutput, hosts: SamplerOutput) -> None:
    good = [i for i in range(len(hosts.token_ids)) if i not in hosts.failed]
    assert ours.token_ids[good].tolist() == hosts.token_ids[good].tolist()
    assert (ours.failed, ours.fields_at_fault) == (hosts.failed, hosts.fields_at_fault)
    assert {i: ours.logprobs.get(i) for i in good} == {i: hosts.logprobs.get(i) for i in good}


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
def test_answers_are_the_hosts_token_after_token_whatever_is_asked(mode: str):
    """Each step's last tokens are chosen so that bad words, budgets and counts matter."""
    requests = everybody() if mode == "raw_logits" else everybody(logprobs=4)
    requests[1] = requests[1].clone(logprobs=-1)
    host, device = OnHost(requests, mode), OnTheDevice(requests, mode)
    rng, prompt = random.Random(3), [1, 2, 8]
    tokens = [list(prompt) for _ in requests]
    for step in range(8):
        logits = 3 * torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(step))
        logits[:, ::9] = logits[:, ::9].round()  # ties
        given = (logits, tokens, len(prompt), masks(12, 13, seed=step))
        expected = host.sample(*given)
        assert not expected.failed
        assert_same(device.sample(*given), expected)
        for own in tokens:
            own.append(rng.choice([3, 8, 8, 8, 6, 20, 21, 10, rng.randrange(VOCAB)]))


def test_each_kind_of_change_changes_something_here():
    """Or the tests above could not fail."""
    plain = [SamplingParams(temperature=each.temperature, max_tokens=None) for each in everybody()]
    logits = 3 * torch.randn(len(plain), VOCAB, generator=torch.Generator().manual_seed(1))
    given = (logits, [[1, 2, 8, 3, 8]] * len(plain), 3)

    def processed(requests: list[SamplingParams], *grammar: GrammarMask) -> dict[int, LogprobsLists]:
        asked = [params.clone(logprobs=-1, logprob_token_ids=None) for params in requests]
        return OnHost(asked, "processed_logits").sample(*given, *grammar).logprobs

    free, asked = processed(plain), processed(everybody(), masks(12, 13))
    # Two only draw, one only reads, and a budget is not spent yet.
    assert [i for i in range(len(plain)) if free[i] == asked[i]] == [0, 1, 9, 10]


def test_rows_of_no_numbers_and_constraints_that_leave_nothing_fail_for_the_hosts_reasons():
    requests = everybody(logprobs=4)
    requests[4] = SamplingParams(max_tokens=None, allowed_token_ids=[9], min_tokens=3)
    requests[5] = SamplingParams(max_tokens=None, bad_words_token_ids=[[i] for i in range(VOCAB)])
    host, device = OnHost(requests, "raw_logprobs"), OnTheDevice(requests, "raw_logprobs")
    logits = torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(1))
    logits[0, 5], logits[3, 7], logits[6], logits[12, 1] = float("nan"), float("inf"), float("-inf"), float("nan")
    grammar = GrammarMask(np.array([12, 13]), np.array([[0] * 4, [1, 0, 0, 0]], np.uint32))
    given = (logits, [[1, 2, 3]] * len(requests), 2, grammar)
    expected = host.sample(*given)
    assert set(expected.failed) == {0, 3, 4, 5, 6, 12, 13} and set(expected.fields_at_fault) == {4, 5, 13}
    assert_same(device.sample(*given), expected)


def test_counts_outlive_a_request_that_lost_its_row_of_them_and_are_another_requests_no_more():
    """As many requests as there are rows of counts, then others, then the first again."""
    requests = [SamplingParams(temperature=0, frequency_penalty=0.7, max_tokens=None)] * (MOST_ROWS + 8)
    host, device = OnHost(requests, "raw_logprobs"), OnTheDevice(requests, "raw_logprobs")
    rng = random.Random(1)
    tokens = [[rng.randrange(20) for _ in range(9 + i % 4)] for i in range(len(requests))]
    all_rows = host.rows
    for begin in (0, 8, 0, 4):
        chosen = slice(begin, begin + MOST_ROWS)
        host.rows = device.rows = all_rows[chosen]
        logits = torch.randn(MOST_ROWS, VOCAB, generator=torch.Generator().manual_seed(begin))
        expected = host.sample(logits, tokens[chosen], 4)
        assert_same(device.sample(logits, tokens[chosen], 4), expected)
        for own, token in zip(tokens[chosen], expected.token_ids.tolist()):
            own.append(token)


def test_a_row_of_the_table_that_changes_hands_takes_no_counts_along_and_leaves_none_behind():
    params = SamplingParams(temperature=0, frequency_penalty=2.0, max_tokens=None)
    device, host = OnTheDevice([params], "raw_logprobs"), OnHost([params], "raw_logprobs")
    logits, row = torch.zeros(1, VOCAB), int(device.rows[0])
    for i in range(MOST_ROWS + 2):  # more than there are rows of counts
        given = (logits, [[1, *range(i % 5), 3]], 1)
        assert_same(device.sample(*given), host.sample(*given))
        for side in (host, device):
            side.sampler.add_request(row, params, 0, EOS)
        device.sampling.forget(row)


def test_a_prompt_of_vectors_has_no_tokens_to_count():
    params = SamplingParams(temperature=0, repetition_penalty=3.0, max_tokens=None)
    host, device = OnHost([params], "raw_logprobs"), OnTheDevice([params], "raw_logprobs")
    for side in (host, device):
        plain = side.batch
        side.batch = lambda *args, plain=plain: replace(plain(*args), has_vectors=np.array([True]))
    logits = torch.linspace(1.0, 2.0, VOCAB).unsqueeze(0)
    tokens = [[96, 95, 96]]
    for _ in range(4):
        expected = host.sample(logits, tokens, 3)
        assert_same(device.sample(logits, tokens, 3), expected)
        tokens[0].append(int(expected.token_ids[0]))
    assert tokens[0][3:] == [96, 95, 94, 93]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.argmax().item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x[x > 0],
        lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x.numpy(), lambda x: x[torch.tensor([0])], lambda x: x[[0, 1]],
        lambda x: int(x[0]), lambda x: torch.zeros(3).copy_(x), lambda x: x.to("cpu"), lambda x: np.asarray(x),
        lambda x: (x * 2 + torch.ones(3)).max().item(), lambda x: x.masked_select(x > 0), lambda x: list(range(x[0])),
    ],
)  # fmt: skip
def test_a_look_at_what_is_on_the_device_is_found_out(read):
    with pytest.raises(HostRead):
        read(torch.tensor([1, 2, 3]).as_subclass(OnDevice))
