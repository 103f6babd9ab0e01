"""Scaling and soft caps in place: the native kernels against the references."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import scaling

pytestmark = pytest.mark.usefixtures("isa")
SIZES = [0, 1, 7, 33, 1031, 4096, 3 * 4096 + 5]
TOLERANCE = {torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of the cap; half a unit at 1


@pytest.mark.parametrize("size", SIZES)
def test_a_scaled_number_has_the_references_bits(dtype, size, assert_same_bits):
    x = torch.randn(size).mul(4).to(dtype)
    ours, theirs = x.clone(), x.clone()
    scaling.scale_cpu(ours, 33.9411255)
    scaling.scale_reference(theirs, 33.9411255)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_a_capped_number_is_near_the_references(dtype, size, cap, assert_close):
    x = torch.randn(size).mul(20).to(dtype)
    ours, exact = x.clone(), cap * (x.double() / cap).tanh()
    scaling.soft_cap_cpu(ours, cap)
    assert_close(ours.double() / cap, exact / cap, TOLERANCE[dtype])
    assert (ours.abs() <= cap).all()


def test_infinities_become_the_cap_and_nan_stays():
    x = torch.tensor([float("-inf"), -1e30, 0.0, 1e30, float("inf"), float("nan")])
    scaling.soft_cap_cpu(x, 30.0)
    assert x[:5].tolist() == [-30.0, -30.0, 0.0, 30.0, 30.0] and x[5].isnan()


def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype, num_threads, assert_same_bits):
    rows = torch.randn(300, 101).mul(10).to(dtype)
    for op in (lambda x: scaling.scale_cpu(x, 8.0625), lambda x: scaling.soft_cap_cpu(x, 30.0)):
        whole = rows.clone()
        op(whole)
        for row in (0, 1, 150, 299):
            alone = rows[row].clone()
            op(alone)
            assert_same_bits(alone, whole[row])


def test_what_is_not_contiguous_is_refused():
    for op in (scaling.scale_cpu, scaling.soft_cap_cpu):
        with pytest.raises(ValueError, match="must be"):
            op(torch.zeros(4, 6)[:, 1:], 2.0)
