"""Bits that mask logits: the native kernel against the reference, at every width of the last word."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minivllm.ops import bitmask, native
from minivllm.ops.op import OpSpec

needs_kernels = pytest.mark.skipif(
    native.why_not(OpSpec("cpu", torch.float32)) is not None, reason="no kernels"
)


def make_case(vocab_size: int, num_rows: int = 5, num_more_words: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows 3, 0, 4 with bits of every kind: all, none and random ones."""
    rng = np.random.default_rng(vocab_size)
    bits = rng.integers(0, 2**32, (3, -(-vocab_size // 32) + num_more_words), dtype=np.uint32)
    bits[:, ::3], bits[:, 1::3] = 0, 0xFFFFFFFF
    bits[1] = rng.integers(0, 2**32, bits.shape[1], dtype=np.uint32)
    return torch.tensor([3, 0, 4]), torch.from_numpy(bits.view(np.int32))


def test_the_reference_keeps_exactly_the_tokens_whose_bit_is_set():
    logits = torch.arange(120.0).reshape(3, 40)
    bits = torch.tensor([[(1 << 3 | 1 << 31) - (1 << 32), 1 << 7]], dtype=torch.int32)
    bitmask.reference(logits, torch.tensor([1]), bits)
    assert logits[1].isfinite().nonzero().flatten().tolist() == [3, 31, 39]
    assert logits[1, 39] == 79 and logits[[0, 2]].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100, 4095, 4096, 4097, 9001])
@pytest.mark.parametrize("num_more_words", [0, 2])
def test_the_kernel_masks_what_the_reference_masks(isa, vocab_size, num_more_words, assert_same_bits):
    rows, bits = make_case(vocab_size, num_more_words=num_more_words)
    given = torch.randn(5, vocab_size + 7)[:, 3 : vocab_size + 3]
    expected, got = given.clone(), torch.empty(5, vocab_size + 7)[:, 3 : vocab_size + 3].copy_(given)
    bitmask.reference(expected, rows, bits)
    bitmask.cpu(got, rows, bits)
    assert_same_bits(got, expected)
    assert expected[3].isinf().any() or vocab_size == 1


@needs_kernels
def test_no_rows_change_nothing(assert_same_bits):
    logits = torch.randn(2, 50)
    kept = logits.clone()
    bitmask.cpu(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int32))
    assert_same_bits(logits, kept)


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "shape", "why"),
    [([2], (1, 2), "among 2"), ([0], (1, 1), "do not fit"), ([0, 1], (1, 2), "do not fit")],
)
def test_bits_that_do_not_fit_are_refused(rows, shape, why):
    with pytest.raises(ValueError, match=why):
        bitmask.cpu(torch.zeros(2, 50), torch.tensor(rows), torch.zeros(shape, dtype=torch.int32))
