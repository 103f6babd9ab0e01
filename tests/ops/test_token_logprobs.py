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


def of_every_token(logits: torch.Tensor) -> torch.Tensor:
    return token_logprobs.cpu(logits, torch.arange(logits.shape[1]).expand(logits.shape).contiguous())[0]


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


@needs_kernels
@pytest.mark.parametrize("vocab_size", [1, 7, 16, 100, 4095, 4096, 4097, 20011])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_each_logprob_is_within_1e_6_of_float64(isa, vocab_size, spread, assert_close):
    logits = torch.randn(3, vocab_size) * spread
    assert_close(of_every_token(logits), torch.log_softmax(logits.double(), -1), 1e-6)


@needs_kernels
@pytest.mark.parametrize("masked", [slice(0, 4096), slice(10, 9000), slice(1, None)])
def test_masked_tokens_have_no_probability_and_change_no_other(isa, masked, assert_close):
    logits = torch.randn(2, 10000)
    logits[:, masked] = -torch.inf
    got, expected = of_every_token(logits), torch.log_softmax(logits.double(), -1)
    assert got[:, masked].eq(-torch.inf).all()
    kept = expected.isfinite()
    assert_close(got[kept], expected[kept], 1e-6)


@needs_kernels
def test_rows_have_the_same_bits_alone_and_in_a_batch(isa, num_threads, assert_same_bits):
    logits = torch.randn(9, 9001) * 8
    whole = of_every_token(logits)
    for row in range(9):
        assert_same_bits(of_every_token(logits[row : row + 1]), whole[row : row + 1])
    native.lib.set_num_threads(1)
    assert_same_bits(of_every_token(logits), whole)


@needs_kernels
@pytest.mark.parametrize("vocab_size", [5, 4096, 9001])
def test_a_rank_counts_no_logit_beyond_the_row(isa, vocab_size):
    wide = torch.zeros(2, vocab_size + 40)
    logits = wide[:, 20 : 20 + vocab_size]
    logits[1] = -torch.inf
    _, ranks = token_logprobs.cpu(logits, torch.tensor([[0], [vocab_size - 1]]))
    assert ranks.tolist() == [vocab_size, vocab_size]


@needs_kernels
def test_rows_of_a_wider_matrix_are_read_where_they_lie(isa, assert_same_bits):
    part = torch.randn(4, 300)[:, 20:221]
    assert_same_bits(of_every_token(part), of_every_token(part.contiguous()))


@needs_kernels
def test_what_the_kernel_cannot_read_is_refused():
    with pytest.raises(ValueError, match="logits is .*float64.*must be .*float32"):
        token_logprobs.cpu(torch.zeros(1, 5, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64))
    for outside in (5, -1):
        with pytest.raises(IndexError, match=f"token {outside} lies outside the vocabulary of 5"):
            token_logprobs.cpu(torch.zeros(1, 5), torch.tensor([[outside]]))


@pytest.mark.parametrize("find", [likeliest_tokens.reference, likeliest_tokens.cpu])
@pytest.mark.parametrize("num_tokens", [1, 2, 40, 301])
def test_the_likeliest_come_in_order_and_equals_by_their_ids(find, num_tokens: int):
    logits = logits_of(num_rows=19)
    found = find(logits, num_tokens)
    for row, ids in zip(logits.tolist(), found.tolist()):
        assert ids == sorted(range(301), key=lambda i: (-row[i], i))[:num_tokens]


def test_no_rows_have_no_tokens():
    assert token_logprobs.token_logprobs.select(OpSpec("cpu", torch.float32))(
        torch.zeros(0, 9), torch.zeros(0, 3, dtype=torch.int64)
    )[0].shape == (0, 3)
    assert likeliest_tokens.likeliest_tokens.select(OpSpec("cpu", torch.float32))(torch.zeros(0, 9), 3).shape == (0, 3)


def test_a_device_is_not_waited_for():
    chosen = likeliest_tokens.likeliest_tokens.select(OpSpec("cuda", torch.float32))
    assert chosen.__module__ == "minivllm.ops.triton.likeliest_tokens"


@needs_kernels
def test_a_cpu_gets_the_native_logprobs_of_what_is_float32():
    assert token_logprobs.token_logprobs.select(OpSpec("cpu", torch.float32)) is token_logprobs.cpu
    assert token_logprobs.token_logprobs.select(OpSpec("cpu", torch.bfloat16)) is token_logprobs.reference
