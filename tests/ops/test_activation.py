"""SiLU(gate) * up and GELU(gate) * up: the native kernels against the references."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import activation
from minivllm.ops.op import OpSpec

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
pytestmark = pytest.mark.usefixtures("isa")


KERNELS = {
    "silu": (activation.cpu, activation.reference),
    "gelu_tanh": (activation.gelu_tanh_cpu, activation.gelu_tanh_reference),
}


@pytest.mark.parametrize("width", [1, 7, 16, 48, 100, 1031])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 33])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_agrees_with_the_reference(name, dtype, num_tokens, width, assert_close):
    kernel, reference = KERNELS[name]
    gate_up = torch.randn(num_tokens, 2 * width).mul(4).to(dtype)
    assert_close(kernel(gate_up), reference(gate_up), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gates_give_zero_or_the_gate_itself(dtype):
    gates = torch.tensor([-float("inf"), -1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("inf"), float("nan")])
    gates = gates.to(dtype)
    got = activation.cpu(torch.cat([gates, torch.ones(10).to(dtype)]).unsqueeze(0))[0]
    assert got[1:3].tolist() == [0.0, 0.0] and abs(got[3]) < 1e-35
    assert got[4:9].tolist() == gates[4:9].tolist()
    assert got[0].isnan() and got[9].isnan()  # -inf * 0 is NaN in the reference too


def test_silu_of_each_bfloat16_is_that_of_a_wide_computation_rounded():
    gates = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    gates = gates[gates.isfinite()]
    wide = gates.double() * torch.sigmoid(gates.double())
    got = activation.cpu(torch.cat([gates, torch.ones_like(gates)]).unsqueeze(0))[0]
    same = (got == wide.bfloat16()) | (wide.abs() < 1e-35)
    assert int((~same).sum()) <= 2 and torch.allclose(got.double(), wide, rtol=2**-7, atol=1e-35)


def test_gelu_is_that_of_a_wide_computation_near_zero_and_far_out():
    gates = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e-4, 1e-6, -1e30, -200.0, 200.0, 1e30])])
    got = activation.gelu_tanh_cpu(torch.cat([gates, torch.ones(len(gates))]).unsqueeze(0))[0]
    wide = gates.double()
    inner = 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    expected = wide * torch.sigmoid(inner)  # x / 2 (1 + tanh(u)) is x sigmoid(2 u)
    assert torch.allclose(got.double(), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(name, dtype, num_threads, assert_same_bits):
    kernel, _ = KERNELS[name]
    gate_up = torch.randn(300, 2 * 101).to(dtype)
    whole = kernel(gate_up)
    for row in (0, 1, 150, 299):
        assert_same_bits(kernel(gate_up[row : row + 1]), whole[row : row + 1])


def test_a_strided_row_is_read_where_it_lies(dtype, assert_same_bits):
    wide = torch.randn(6, 64).to(dtype)
    assert_same_bits(activation.cpu(wide[:, 8:40]), activation.cpu(wide[:, 8:40].contiguous()))


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="must be"):
        activation.cpu(torch.zeros(2, 3))


def test_the_kernel_is_preferred_on_a_cpu():
    assert activation.silu_mul.select(OpSpec("cpu", torch.bfloat16)) is activation.cpu
