"""int4 linear layers: bit for bit the specification, on every instruction set; alone, in a batch and in pieces."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import activation, native
from minivllm.ops.linear_int4 import GROUP, DenseInt4Linear, PackedInt4Linear, int4_linear, quantise_weight
from minivllm.ops.op import OpSpec

SHAPES = [(1, 64), (17, 48), (33, 128), (100, 256), (130, 5), (257, 1100), (96, 1216)]  # (N, K)
NUM_ROWS = [1, 2, 5, 16, 17, 33, 70]
pytestmark = pytest.mark.usefixtures("isa")


def matrix(rows, columns, dtype=torch.float32):
    return torch.randn(rows, columns).to(dtype)


def packed(weight, dtype, cls=PackedInt4Linear, **options):
    layer = cls(*weight.shape, dtype, **options)
    layer.load_rows(0, weight)
    return layer


@pytest.mark.parametrize("n, k", SHAPES)
def test_every_shape_has_the_bits_of_the_specification(dtype, n, k, assert_same_bits):
    weight, bias = matrix(n, k, dtype), torch.randn(n)
    ours, reference = packed(weight, dtype), packed(weight, dtype, DenseInt4Linear)
    for m in NUM_ROWS:
        x, addend = matrix(m, k, dtype), torch.randn(m, n)
        assert_same_bits(ours(x) + 0, reference(x) + 0)
        assert_same_bits(
            ours(x, bias, torch.float32, addend=addend), reference(x, bias, torch.float32, addend=addend)
        )


@pytest.mark.parametrize("spread", ["even", "one outlier a row", "one large group", "of one sign"])
def test_a_weight_becomes_the_nearest_of_16_levels_a_step_apart_that_suits_its_group(spread):
    weight = matrix(64, 512)
    if spread == "one outlier a row":
        weight[:, 7] = 40
    if spread == "one large group":
        weight[:, 128:256] *= 10
    if spread == "of one sign":
        weight = -weight.abs()
    whole, scales = quantise_weight(weight)
    assert whole.min() >= -128 and whole.max() <= 112
    groups, wanted = whole.view(64, -1, GROUP), (weight / scales).view(64, -1, GROUP)
    steps = torch.arange(1, 17).view(-1, 1, 1, 1)
    nearest = (wanted / steps).clamp(-8, 7).round() * steps  # of all steps, not only of those that were tried
    least = (nearest - wanted).square().sum(-1).amin(0)
    assert ((groups - wanted).square().sum(-1) <= 1.05 * least).all()


def test_the_error_is_that_of_four_bits(dtype):
    weight, x = matrix(200, 1024, dtype), matrix(50, 1024, dtype)
    exact = x.double() @ weight.double().t()
    error = packed(weight, dtype)(x, out_dtype=torch.float32).double() - exact
    assert error.pow(2).mean().sqrt() < 0.11 * exact.pow(2).mean().sqrt()


def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype, num_threads, assert_same_bits):
    for n, k in [(257, 96), (100, 1500)]:
        layer, x = packed(matrix(n, k), dtype), matrix(1000, k, dtype)
        x[17] *= 1000  # its scale is its own
        whole = layer(x)
        for row in (0, 1, 16, 17, 31, 500, 999):
            assert_same_bits(layer(x[row : row + 1]), whole[row : row + 1])
        assert_same_bits(torch.cat([layer(part) for part in x.split(41)]), whole)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_loaded_in_pieces_of_any_dtype_equal_rows_loaded_at_once(dtype, source, assert_same_bits):
    weight, x = matrix(150, 77, source), matrix(5, 77, dtype)
    pieces = PackedInt4Linear(150, 77, dtype)
    for start, stop in [(97, 150), (0, 1), (1, 40), (40, 97)]:
        pieces.load_rows(start, weight[start:stop])
    assert_same_bits(pieces(x), packed(weight.float(), dtype)(x))


@pytest.mark.parametrize("m, inner, k", [(1, 16, 64), (5, 37, 50), (70, 130, 1100)])
def test_the_epilogues_equal_the_separate_operations(dtype, m, inner, k, assert_same_bits):
    weight, x, bias = matrix(2 * inner, k), matrix(m, k, dtype), torch.randn(2 * inner)
    plain = packed(weight, dtype)
    gated = PackedInt4Linear(2 * inner, k, dtype, gated=True)
    gated.load_rows(inner, weight[inner:])
    gated.load_rows(0, weight[:inner])
    assert_same_bits(gated.silu_mul(x, bias), activation.cpu(plain(x, bias)))
    residual = matrix(m, 2 * inner, dtype)
    expected = residual + plain(x, bias)
    plain.add_to(residual, x, bias)
    assert_same_bits(residual, expected)


def test_rows_come_back_dequantised(dtype, num_threads, assert_same_bits):
    weight, ids = matrix(131, 77), torch.tensor([130, 0, 64, 64, 31])
    q, scales = quantise_weight(weight)
    expected = (q * scales)[ids].to(dtype) + 0  # no negative zeros: an integer has none
    assert_same_bits(packed(weight, dtype).rows(ids), expected)
    assert_same_bits(packed(weight, dtype, DenseInt4Linear).rows(ids), expected)
    with pytest.raises(IndexError):
        packed(weight, dtype).rows(torch.tensor([131]))


def test_one_bad_row_does_not_touch_the_others(dtype, assert_same_bits):
    layer, x = packed(matrix(40, 50), dtype), matrix(20, 50, dtype)
    good = layer(x)
    x[7, 3], x[9, 49] = float("nan"), -float("inf")
    spoiled = layer(x)
    assert spoiled[7].isnan().all() and spoiled[9].isnan().all()
    kept = [i for i in range(20) if i not in (7, 9)]
    assert_same_bits(spoiled[kept], good[kept])


def test_rows_of_zeros_and_of_next_to_nothing_give_zeros(assert_same_bits):
    layer = packed(matrix(40, 50), torch.float32)
    x = torch.stack([torch.zeros(50), torch.full((50,), 1e-39), torch.full((50,), 1e-25)])
    y = layer(x)
    assert (y[:2] == 0).all() and y[2].isfinite().all() and (y[2] != 0).any()
    assert_same_bits(y + 0, packed_like(layer, x) + 0)


def packed_like(layer, x):
    torch.manual_seed(0)
    return packed(matrix(40, 50), torch.float32, DenseInt4Linear)(x)


def test_the_packed_size_is_half_a_byte_a_weight_and_little_more(dtype):
    assert PackedInt4Linear(4096, 1024, dtype).nbytes == 4096 * 1024 * (1 / 2 + 1 / GROUP) + 4096 * 4


def test_a_sum_that_could_overflow_is_left_to_the_reference():
    sizes = {"in_features": (1 << 17) + 1, "out_features": 8}
    assert int4_linear.select(OpSpec("cpu", torch.bfloat16, sizes)) is DenseInt4Linear
    assert int4_linear.select(OpSpec("cpu", torch.bfloat16, {"in_features": 64})) is PackedInt4Linear
    assert native.lib is not None
