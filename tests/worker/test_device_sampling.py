"""Sampling on a device gives what sampling on the host gives, to the bit, without one look at what is on the device."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from minivllm.messages.engine import LogprobsLists
from minivllm.ops.op import Op
from minivllm.sample.sampler import SamplerOutput
from minivllm.sample.step import GrammarMask
from minivllm.sampling_params import SamplingParams
from tests.gpu import sampling
from tests.gpu.sampling import EOS, WITH_GRAMMAR, differences, everybody, masks
from tests.worker.fake_device import FakeDevice, HostRead, OnDevice, on_device, strict_ops

VOCAB, MOST_ROWS = 97, 32


class OnHost(sampling.OnHost):
    def __init__(self, requests: list[SamplingParams], mode: str = "raw_logprobs") -> None:
        super().__init__(requests, mode, VOCAB)


class OnTheDevice(sampling.OnDevice):
    """On the device that is none, where nothing can be read."""

    def __init__(self, requests: list[SamplingParams], mode: str = "raw_logprobs") -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Op, "select", strict_ops(Op.select))
            super().__init__(requests, mode, VOCAB, FakeDevice(), to_device=on_device, max_num_rows=MOST_ROWS)

    def sample(self, logits, *given) -> SamplerOutput:
        output = super().sample(logits, *given)
        after = self.given.as_subclass(torch.Tensor)
        assert torch.equal(after.view(torch.int32), logits.view(torch.int32)), "logits stay as they are"
        return output


def assert_same(ours: SamplerOutput, hosts: SamplerOutput) -> None:
    assert differences(ours, hosts) == []


@pytest.mark.parametrize("mode", sampling.MODES)
def test_answers_are_the_hosts_token_after_token_whatever_is_asked(mode: str):
    requests = everybody() if mode == "raw_logits" else everybody(logprobs=4)
    requests[1] = requests[1].clone(logprobs=-1)
    found = sampling.steps(OnHost(requests, mode), OnTheDevice(requests, mode), VOCAB)
    assert found == [[]] * len(found)


def test_each_kind_of_change_changes_something_here():
    """Or the tests above could not fail."""
    plain = [SamplingParams(temperature=each.temperature, max_tokens=None) for each in everybody()]
    logits = 3 * torch.randn(len(plain), VOCAB, generator=torch.Generator().manual_seed(1))
    given = (logits, [[1, 2, 8, 3, 8]] * len(plain), 3)

    def processed(requests: list[SamplingParams], *grammar: GrammarMask) -> dict[int, LogprobsLists]:
        asked = [params.clone(logprobs=-1, logprob_token_ids=None) for params in requests]
        return OnHost(asked, "processed_logits").sample(*given, *grammar).logprobs

    free, asked = processed(plain), processed(everybody(), masks(WITH_GRAMMAR, VOCAB))
    # Two only draw, one only reads, and a budget is not spent yet.
    assert [i for i in range(len(plain)) if free[i] == asked[i]] == [0, 1, 9, 10]


def test_rows_of_no_numbers_and_constraints_that_leave_nothing_fail_for_the_hosts_reasons():
    requests = everybody(logprobs=4)
    requests[4] = SamplingParams(max_tokens=None, allowed_token_ids=[9], min_tokens=3)
    requests[5] = SamplingParams(max_tokens=None, bad_words_token_ids=[[i] for i in range(VOCAB)])
    host, device = OnHost(requests), OnTheDevice(requests)
    logits = torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(1))
    logits[0, 5], logits[3, 7], logits[6], logits[12, 1] = float("nan"), float("inf"), float("-inf"), float("nan")
    grammar = GrammarMask(np.array([12, 13]), np.array([[0] * 4, [1, 0, 0, 0]], np.uint32))
    given = (logits, [[1, 2, 3]] * len(requests), 2, grammar)
    expected = host.sample(*given)
    assert set(expected.failed) == {0, 3, 4, 5, 6, 12, 13} and set(expected.fields_at_fault) == {4, 5, 13}
    assert_same(device.sample(*given), expected)


def test_a_request_that_left_meanwhile_is_still_told_why_it_failed():
    params = SamplingParams(max_tokens=None, allowed_token_ids=[9], min_tokens=3)
    device = OnTheDevice([params])
    row = int(device.rows[0])
    device.before_arrival = lambda: device.sampler.remove_request(row)
    output = device.sample(torch.zeros(1, VOCAB), [[1, 2, 3]], 2)
    assert output.fields_at_fault == {0: "allowed_token_ids"}
    assert "after 1 tokens of output" in output.failed[0]


def test_counts_outlive_a_request_that_lost_its_row_of_them_and_are_another_requests_no_more():
    """As many requests as there are rows of counts, then others, then the first again."""
    requests = [SamplingParams(temperature=0, frequency_penalty=0.7, max_tokens=None)] * (MOST_ROWS + 8)
    host, device = OnHost(requests), OnTheDevice(requests)
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
    device, host = OnTheDevice([params]), OnHost([params])
    logits, row = torch.zeros(1, VOCAB), int(device.rows[0])
    for i in range(MOST_ROWS + 2):  # more than there are rows of counts
        given = (logits, [[1, *range(i % 5), 3]], 1)
        assert_same(device.sample(*given), host.sample(*given))
        for side in (host, device):
            side.sampler.add_request(row, params, 0, EOS)
        device.sampling.forget(row)


def test_a_prompt_of_vectors_has_no_tokens_to_count():
    params = SamplingParams(temperature=0, repetition_penalty=3.0, max_tokens=None)
    host, device = OnHost([params]), OnTheDevice([params])
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
        lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x.numpy(), lambda x: x[torch.tensor([0])],
        lambda x: x[[0, 1]], lambda x: int(x[0]), lambda x: torch.zeros(3).copy_(x), lambda x: x.to("cpu"),
        lambda x: np.asarray(x),
        lambda x: (x * 2 + torch.ones(3)).max().item(), lambda x: x.masked_select(x > 0),
    ],
)  # fmt: skip
def test_a_look_at_what_is_on_the_device_is_found_out(read):
    with pytest.raises(HostRead):
        read(torch.tensor([1, 2, 3]).as_subclass(OnDevice))
