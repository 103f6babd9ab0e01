"""What linear layers do for their neighbours: the norm before them, and of a gated MLP both projections, as one."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import native, rms_norm
from minivllm.ops.linear import PackedLinear
from minivllm.ops.linear_int4 import PackedInt4Linear
from minivllm.ops.linear_int8 import PackedInt8Linear
from minivllm.ops.rms_norm import RowNorm

OWN_ISAS = ("avx512_vnni", "avx512_bf16")
pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(params=[PackedLinear, PackedInt8Linear, PackedInt4Linear])
def cls(request) -> type[PackedLinear]:
    return request.param


def layer_of(cls, out_features, in_features, dtype, *, gated=False):
    layer = cls(out_features, in_features, dtype, gated=gated)
    layer.load_rows(0, torch.randn(out_features, in_features) / in_features**0.5)
    return layer


def row_norm(size, dtype):
    return RowNorm((1 + torch.randn(size) / 10).to(dtype), 1e-6)


@pytest.mark.parametrize("is_wide", [False, True], ids=["weight of x's dtype", "weight of float32"])
@pytest.mark.parametrize("n, k", [(33, 48), (64, 256), (1100, 100)])
def test_a_norm_that_is_part_of_a_product_equals_the_norm_before_it(
    cls, dtype, n, k, is_wide, num_threads, assert_same_bits
):
    layer, norm = layer_of(cls, n, k, dtype), row_norm(k, torch.float32 if is_wide else dtype)
    for m in (1, 5, 70):
        x = torch.randn(m, k + 3).to(dtype)[:, :k]
        assert_same_bits(layer(x, norm=norm), layer(rms_norm.cpu(x, norm.weight, norm.eps)))


@pytest.mark.parametrize(
    "m, inner", [(1, 80), (5, 80), (70, 80), (257, 80), (530, 80), (530, 3600)]
)  # 3600: too wide
def test_a_gated_mlp_equals_its_parts(cls, dtype, m, inner, num_threads, assert_same_bits):
    hidden = 96
    gate_up, down = layer_of(cls, 2 * inner, hidden, dtype, gated=True), layer_of(cls, hidden, inner, dtype)
    bias, down_bias, norm = torch.randn(2 * inner), torch.randn(hidden), row_norm(hidden, dtype)
    residual = torch.randn(m, hidden + 32).to(dtype)[:, :hidden]
    expected = residual.clone()
    down.add_to(expected, gate_up.silu_mul(rms_norm.cpu(residual, norm.weight, norm.eps), bias), down_bias)
    gate_up.add_gated(residual, residual, down, bias, down_bias, norm=norm)
    assert_same_bits(residual, expected)


def test_a_gated_mlp_of_another_input_leaves_it(cls, dtype, assert_same_bits):
    gate_up, down = layer_of(cls, 64, 48, dtype, gated=True), layer_of(cls, 40, 32, dtype)
    x, residual = torch.randn(20, 48).to(dtype), torch.zeros(20, 40, dtype=dtype)
    before = x.clone()
    gate_up.add_gated(residual, x, down)
    assert_same_bits(x, before)
    assert_same_bits(residual + 0, down(gate_up.silu_mul(x)) + 0)  # zero + -0


def test_each_weight_of_a_gated_mlp_is_read_as_it_was_packed(cls, dtype, isa, assert_same_bits):
    gate_up = layer_of(cls, 64, 48, dtype, gated=True)
    native.lib.set_isa("avx2")
    down = layer_of(cls, 48, 32, dtype)
    residual = torch.randn(20, 48).to(dtype)
    expected = residual.clone()
    down.add_to(expected, gate_up.silu_mul(residual))
    gate_up.add_gated(residual, residual, down)
    assert_same_bits(residual, expected)


def test_a_row_of_a_gated_mlp_has_the_same_bits_alone_and_in_a_batch(
    cls, dtype, num_threads, assert_same_bits
):
    gate_up, down = layer_of(cls, 160, 96, dtype, gated=True), layer_of(cls, 96, 80, dtype)
    norm, x = row_norm(96, dtype), torch.randn(800, 96).to(dtype)

    def applied(rows):
        residual = rows.clone()
        gate_up.add_gated(residual, residual, down, norm=norm)
        return residual

    whole = applied(x)
    for row in (0, 31, 256, 799):
        assert_same_bits(applied(x[row : row + 1]), whole[row : row + 1])
    assert_same_bits(torch.cat([applied(part) for part in x.split(123)]), whole)


def test_what_does_not_fit_is_refused():
    gate_up, down = (
        layer_of(PackedLinear, 64, 48, torch.float32, gated=True),
        layer_of(PackedLinear, 48, 32, torch.float32),
    )
    x = torch.randn(5, 48)
    with pytest.raises(ValueError, match="residual"):
        gate_up.add_gated(torch.zeros(5, 47), x, down)
    with pytest.raises(ValueError, match="down takes 48"):
        gate_up.add_gated(x, x, layer_of(PackedLinear, 48, 48, torch.float32))
    with pytest.raises(ValueError, match="norm's weight"):
        gate_up.add_gated(x, x, down, norm=RowNorm(torch.ones(47), 1e-6))
    with pytest.raises(ValueError, match="bias"):
        gate_up.add_gated(x, x, down, down_bias=torch.ones(47))
