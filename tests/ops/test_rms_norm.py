"""RMSNorm: the native kernels against the reference, on odd sizes and strided views."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import rms_norm
from minivllm.ops.op import OpSpec

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
EPS = 1e-6
pytestmark = pytest.mark.usefixtures("isa")


def weight_of(hidden, dtype):
    return torch.rand(hidden).add(0.5).to(dtype)


@pytest.mark.parametrize("hidden", [1, 7, 16, 64, 100, 129, 1024])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 33])
def test_the_kernel_agrees_with_the_reference(dtype, num_tokens, hidden, assert_close):
    x, weight = torch.randn(num_tokens, hidden).to(dtype), weight_of(hidden, dtype)
    assert_close(rms_norm.cpu(x, weight, EPS), rms_norm.reference(x, weight, EPS), TOLERANCE[dtype])


@pytest.mark.parametrize("hidden", [7, 64, 100])
def test_the_sum_is_rounded_into_the_residual_and_then_normed(dtype, hidden, assert_close, assert_same_bits):
    x, residual = torch.randn(2, 9, hidden).to(dtype)
    weight = weight_of(hidden, dtype)
    ours, theirs = residual.clone(), residual.clone()
    got = rms_norm.add_cpu(x, ours, weight, EPS)
    assert_close(got, rms_norm.add_reference(x, theirs, weight, EPS), TOLERANCE[dtype])
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("hidden", [7, 64, 100])
def test_a_float32_weight_multiplies_before_anything_is_rounded(dtype, hidden, assert_close):
    x, weight = torch.randn(9, hidden).to(dtype), weight_of(hidden, torch.float32)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    for norm in (rms_norm.cpu, rms_norm.reference):
        got = norm(x, weight, EPS)
        assert_close(got, exact, TOLERANCE[dtype])
        if dtype != torch.float32:  # two roundings would change a quarter of the numbers; float32 sums hardly any
            assert (got == exact.to(dtype)).double().mean() > 0.98
    ours, theirs = x.clone(), x.clone()
    got = rms_norm.add_cpu(x, ours, weight, EPS)
    assert_close(got, rms_norm.add_reference(x, theirs, weight, EPS), TOLERANCE[dtype])


def test_heads_inside_a_wider_matrix_are_normed_where_they_lie(dtype, assert_same_bits):
    qkv, weight = torch.randn(5, 8 * 16).to(dtype), weight_of(16, dtype)
    heads = qkv[:, 32:96].unflatten(1, (4, 16))
    assert_same_bits(rms_norm.cpu(heads, weight, EPS), rms_norm.cpu(heads.contiguous(), weight, EPS))


def test_other_shapes_and_strides_are_accepted(assert_same_bits):
    x, weight = torch.randn(2, 3, 4, 8), weight_of(8, torch.float32)
    rows = rms_norm.cpu(x.reshape(-1, 8), weight, EPS)
    assert_same_bits(rms_norm.cpu(x, weight, EPS).reshape(-1, 8), rows)
    assert_same_bits(rms_norm.cpu(x[0, 0, 0], weight, EPS), rows[0])
    turned = torch.randn(8, 6).t()
    assert_same_bits(rms_norm.cpu(turned, weight, EPS), rms_norm.cpu(turned.contiguous(), weight, EPS))


def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype, num_threads, assert_same_bits):
    x, weight = torch.randn(300, 100).to(dtype), weight_of(100, dtype)
    whole = rms_norm.cpu(x, weight, EPS)
    for row in (0, 1, 149, 299):
        assert_same_bits(rms_norm.cpu(x[row : row + 1], weight, EPS), whole[row : row + 1])


def test_a_weight_of_another_dtype_or_size_is_refused():
    x = torch.randn(2, 8)
    for weight in (torch.ones(8, dtype=torch.float16), torch.ones(7)):
        with pytest.raises(ValueError, match="weight is"):
            rms_norm.cpu(x, weight, EPS)


def test_the_reference_serves_what_the_kernel_cannot():
    assert rms_norm.rms_norm.select(OpSpec("cpu", torch.float32)) is rms_norm.cpu
    assert rms_norm.rms_norm.select(OpSpec("cpu", torch.float64)) is rms_norm.reference
    assert rms_norm.add_rms_norm.select(OpSpec("meta", torch.float32)) is rms_norm.add_reference
