"""Log-probabilities: the native kernels against the references, and rows that stay independent."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import log_softmax, native
from minivllm.ops.op import OpSpec

INF = float("inf")
VOCAB_SIZES = [1, 7, 16, 100, 4095, 4096, 4097, 20011]
needs_kernels = pytest.mark.skipif(
    native.why_not(OpSpec("cpu", torch.float32)) is not None, reason="no kernels"
)


@needs_kernels
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_log_softmax_is_within_1e_6_of_float64(isa, vocab_size, spread, assert_close):
    logits = torch.randn(3, vocab_size) * spread
    assert_close(log_softmax.cpu(logits), log_softmax.reference(logits.double()), 1e-6)


@needs_kernels
@pytest.mark.parametrize("masked", [slice(0, 4096), slice(10, 9000), slice(1, None)])
def test_masked_tokens_have_no_probability_and_change_no_other(isa, masked, assert_close):
    logits = torch.randn(2, 10000)
    logits[:, masked] = -INF
    got, expected = log_softmax.cpu(logits), log_softmax.reference(logits.double())
    assert got[:, masked].eq(-INF).all()
    kept = expected.isfinite()
    assert_close(got[kept], expected[kept], 1e-6)


@needs_kernels
def test_log_softmax_rows_have_the_same_bits_alone_and_in_a_batch(isa, num_threads, assert_same_bits):
    logits = torch.randn(9, 9001) * 8
    whole = log_softmax.cpu(logits)
    for row in range(9):
        assert_same_bits(log_softmax.cpu(logits[row : row + 1]), whole[row : row + 1])
    native.lib.set_num_threads(1)
    assert_same_bits(log_softmax.cpu(logits), whole)


@needs_kernels
def test_rows_of_a_wider_matrix_are_read_where_they_lie(isa, assert_same_bits):
    wide = torch.randn(4, 300)
    part = wide[:, 20:221]
    assert_same_bits(log_softmax.cpu(part), log_softmax.cpu(part.contiguous()))


@needs_kernels
def test_a_batch_of_no_rows_is_fine():
    empty = torch.empty(0, 50)
    assert log_softmax.cpu(empty).shape == (0, 50)


@needs_kernels
def test_logits_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="logits is .*float64.*must be .*float32"):
        log_softmax.cpu(torch.zeros(1, 5, dtype=torch.float64))
