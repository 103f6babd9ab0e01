"""cuBLAS's linear layer, its own code on CPU tensors: that it says what `DenseLinear` says."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops.linear import DenseLinear
from minivllm.ops.linear_cuda import CublasLinear


def pair(dtype: torch.dtype, *, gated: bool = False) -> tuple[DenseLinear, CublasLinear]:
    made = DenseLinear(24, 40, dtype, gated=gated), CublasLinear(24, 40, dtype, gated=gated, device="cpu")
    rows = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    for linear in made:
        linear.load_rows(0, rows[:10])
        linear.load_rows(10, rows[10:])
    return made


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_way_to_call_it_agrees_with_the_specification(dtype, tolerance):
    dense, cublas = pair(dtype)
    x, bias, addend = numbers(5, 40, dtype=dtype), numbers(24, dtype=dtype), numbers(5, 24)
    for given in ({}, {"bias": bias}, {"addend": addend}, {"bias": bias, "addend": addend}):
        for out_dtype in (None, torch.float32):
            ours, expected = (linear(x, out_dtype=out_dtype, **given) for linear in (cublas, dense))
            assert ours.dtype == expected.dtype
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
        sums = [numbers(5, 24, dtype=dtype) for _ in range(2)]
        for linear, residual in zip((cublas, dense), sums):
            linear.add_to(residual, x, **given)
        torch.testing.assert_close(*sums, rtol=tolerance, atol=tolerance)
    out = torch.empty(5, 24, dtype=dtype)
    assert cublas(x, out=out) is out
    assert torch.equal(cublas.rows(torch.tensor([3, 0])), dense.rows(torch.tensor([3, 0])))


def test_a_gated_weight_multiplies_up_by_the_gates_silu():
    dense, cublas = pair(torch.float32, gated=True)
    x = numbers(5, 40)
    torch.testing.assert_close(cublas.silu_mul(x), dense.silu_mul(x), rtol=1e-5, atol=1e-5)


def test_logits_in_float32_are_not_rounded_on_the_way():
    dense, cublas = pair(torch.bfloat16)
    x = numbers(5, 40, dtype=torch.bfloat16)
    torch.testing.assert_close(
        cublas(x, out_dtype=torch.float32), dense(x, out_dtype=torch.float32), rtol=1e-5, atol=1e-5
    )
