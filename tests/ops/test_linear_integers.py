"""Linear layers with weights of 8 and of 4 bits: bit for bit the specification, on every instruction set; alone, in a
batch and in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from minivllm.ops import activation, native
from minivllm.ops.linear import DenseLinear, PackedLinear
from minivllm.ops.linear_int4 import GROUP, DenseInt4Linear, PackedInt4Linear, int4_linear, quantise_weight
from minivllm.ops.linear_int8 import DenseInt8Linear, PackedInt8Linear, int8_linear, quantise_rows
from minivllm.ops.op import Op, OpSpec

SHAPES = [(1, 64), (17, 48), (33, 64), (33, 128), (100, 256), (130, 5), (257, 1100), (96, 1100), (96, 1216)]  # (N, K)
NUM_ROWS = [1, 2, 5, 16, 17, 33, 70]
OWN_ISAS = ("avx512_vnni",)
pytestmark = pytest.mark.usefixtures("isa")


def matrix(rows, columns, dtype=torch.float32):
    return torch.randn(rows, columns).to(dtype)


@dataclass(frozen=True)
class Kind:
    packed: type[PackedLinear]
    dense: type[DenseLinear]
    op: Op
    quantise: Callable  # a weight to whole numbers and the scales of its rows
    most_error: float  # of a result, in its standard deviations
    weight_bytes: float


@pytest.fixture(params=["int8", "int4"])
def kind(request) -> Kind:
    if request.param == "int8":
        return Kind(PackedInt8Linear, DenseInt8Linear, int8_linear, quantise_rows, 0.015, 1)
    return Kind(PackedInt4Linear, DenseInt4Linear, int4_linear, quantise_weight, 0.11, 1 / 2 + 1 / GROUP)


def packed(weight, dtype, cls):
    layer = cls(*weight.shape, dtype)
    layer.load_rows(0, weight)
    return layer


@pytest.mark.parametrize("n, k", SHAPES)
def test_every_shape_has_the_bits_of_the_specification(kind, dtype, n, k, assert_same_bits):
    weight, bias = matrix(n, k, dtype), torch.randn(n)
    ours, reference = packed(weight, dtype, kind.packed), packed(weight, dtype, kind.dense)
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


def test_the_error_is_that_of_so_few_bits(kind, dtype):
    weight, x = matrix(200, 1024, dtype), matrix(50, 1024, dtype)
    exact = x.double() @ weight.double().t()
    error = packed(weight, dtype, kind.packed)(x, out_dtype=torch.float32).double() - exact
    assert error.pow(2).mean().sqrt() < kind.most_error * exact.pow(2).mean().sqrt()


def test_a_row_has_the_same_bits_alone_and_in_a_batch(kind, dtype, num_threads, assert_same_bits):
    for n, k in [(257, 96), (100, 1500)]:
        layer, x = packed(matrix(n, k), dtype, kind.packed), matrix(1000, k, dtype)
        x[17] *= 1000  # its scale is its own
        whole = layer(x)
        for row in (0, 1, 16, 17, 31, 500, 999):
            assert_same_bits(layer(x[row : row + 1]), whole[row : row + 1])
        assert_same_bits(torch.cat([layer(part) for part in x.split(41)]), whole)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_loaded_in_pieces_of_any_dtype_equal_rows_loaded_at_once(kind, dtype, source, assert_same_bits):
    weight, x = matrix(150, 77, source), matrix(5, 77, dtype)
    pieces = kind.packed(150, 77, dtype)
    for start, stop in [(97, 150), (0, 1), (1, 40), (40, 97)]:
        pieces.load_rows(start, weight[start:stop])
    assert_same_bits(pieces(x), packed(weight.float(), dtype, kind.packed)(x))


@pytest.mark.parametrize("m, inner, k", [(1, 16, 64), (5, 37, 50), (70, 130, 1100)])
def test_the_epilogues_equal_the_separate_operations(kind, dtype, m, inner, k, assert_same_bits):
    weight, x, bias = matrix(2 * inner, k), matrix(m, k, dtype), torch.randn(2 * inner)
    plain = packed(weight, dtype, kind.packed)
    gated = kind.packed(2 * inner, k, dtype, gated=True)
    gated.load_rows(inner, weight[inner:])
    gated.load_rows(0, weight[:inner])
    assert_same_bits(gated.silu_mul(x, bias), activation.cpu(plain(x, bias)))
    residual = matrix(m, 2 * inner, dtype)
    expected = residual + plain(x, bias)
    plain.add_to(residual, x, bias)
    assert_same_bits(residual, expected)


def test_rows_come_back_dequantised(kind, dtype, num_threads, assert_same_bits):
    weight, ids = matrix(131, 77), torch.tensor([130, 0, 64, 64, 31])
    q, scales = kind.quantise(weight)
    expected = (q * scales)[ids].to(dtype) + 0  # no negative zeros: an integer has none
    for cls in (kind.packed, kind.dense):
        assert_same_bits(packed(weight, dtype, cls).rows(ids), expected)
    with pytest.raises(IndexError):
        packed(weight, dtype, kind.packed).rows(torch.tensor([131]))


def test_the_likeliest_output_is_the_largest_one(kind, dtype, num_threads):
    """All there is to it: test_likeliest.py."""
    for n, k in [(33, 64), (500, 70)]:
        layer, x = packed(matrix(n, k), dtype, kind.packed), matrix(40, k, dtype)
        for part in (x, x[:1], x[:7]):
            assert layer.likeliest(part)[0].tolist() == layer(part, out_dtype=torch.float32).argmax(-1).tolist()


def test_one_bad_row_does_not_touch_the_others(kind, dtype, assert_same_bits):
    layer, x = packed(matrix(40, 50), dtype, kind.packed), matrix(20, 50, dtype)
    good = layer(x)
    x[7, 3], x[9, 49] = float("nan"), -float("inf")
    spoiled = layer(x)
    assert spoiled[7].isnan().all() and spoiled[9].isnan().all()
    kept = [i for i in range(20) if i not in (7, 9)]
    assert_same_bits(spoiled[kept], good[kept])


def test_rows_of_zeros_and_of_next_to_nothing_give_zeros(kind, assert_same_bits):
    weight = matrix(40, 50)
    x = torch.stack([torch.zeros(50), torch.full((50,), 1e-39), torch.full((50,), 1e-25)])
    y = packed(weight, torch.float32, kind.packed)(x)
    assert (y[:2] == 0).all() and y[2].isfinite().all() and (y[2] != 0).any()
    assert_same_bits(y + 0, packed(weight, torch.float32, kind.dense)(x) + 0)


def test_the_packed_size_is_that_of_the_numbers_and_little_more(kind, dtype):
    assert kind.packed(4096, 1024, dtype).nbytes == 4096 * 1024 * kind.weight_bytes + 4096 * 4


def test_a_sum_that_could_overflow_is_left_to_the_reference(kind):
    sizes = {"in_features": (1 << 17) + 1, "out_features": 8}
    assert kind.op.select(OpSpec("cpu", torch.bfloat16, sizes)) is kind.dense
    assert kind.op.select(OpSpec("cpu", torch.bfloat16, {"in_features": 64})) is kind.packed
    assert native.lib is not None
