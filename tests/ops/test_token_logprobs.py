"""Logprobs of given tokens, their ranks, and the likeliest tokens, whose order is defined among equals."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import likeliest_tokens, native, token_logprobs
from minivllm.ops.op import OpSpec

needs_kernels = pytest.mark.skipif(
    native.why_not(OpSpec("cpu", torch.float32)) is not None, reason="no kernels"
)


def logits_of(num_rows: int = 5, vocab_size: int = 301) -> torch.Tensor:
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))
    logits[:, ::3] = logits[:, ::3].round()
    logits[:, 4::9] = float("-inf")
    logits[1] = float("-inf")
    logits[1, 7], logits[1, 3] = -0.0, 0.0
    return logits


@needs_kernels
def test_the_native_logprobs_are_the_references_and_so_are_the_ranks(isa, assert_close):
    logits = logits_of()
    token_ids = torch.tensor([[3, 0, -1], [7, 3, 5], [300, 4, 3], [0, 0, 0], [12, -1, -1]])
    values, ranks = token_logprobs.cpu(logits, token_ids)
    expected, its_ranks = token_logprobs.reference(logits.double(), token_ids)
    assert torch.equal(values.isinf(), expected.isinf()) and values[0, 2] == float("-inf")
    assert_close(values.nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0), 1e-6)
    assert torch.equal(ranks, its_ranks)
    assert ranks[1] == 2  # two are equal, and there is nothing else


@pytest.mark.parametrize("find", [likeliest_tokens.reference, likeliest_tokens.cpu])
@pytest.mark.parametrize("num_tokens", [1, 2, 40, 301])
def test_the_likeliest_come_in_order_and_equals_by_their_ids(find, num_tokens: int):
    logits = logits_of(num_rows=19)
    found = find(logits, num_tokens)
    for row, ids in zip(logits.tolist(), found.tolist()):
        assert ids == sorted(range(301), key=lambda i: (-row[i], i))[:num_tokens]


def test_no_rows_have_no_tokens():
    assert likeliest_tokens.likeliest_tokens.select(OpSpec("cpu", torch.float32))(torch.zeros(0, 9), 3).shape == (0, 3)


def test_a_device_is_not_waited_for():
    assert likeliest_tokens.likeliest_tokens.select(OpSpec("cuda", torch.float32)) is likeliest_tokens.reference


@needs_kernels
def test_a_cpu_gets_the_native_logprobs_of_what_is_float32():
    assert token_logprobs.token_logprobs.select(OpSpec("cpu", torch.float32)) is token_logprobs.cpu
    assert token_logprobs.token_logprobs.select(OpSpec("cpu", torch.bfloat16)) is token_logprobs.reference
