"""Packed linear layers: against float64, alone against in a batch, and read back row by row."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import activation, linear, native
from minivllm.ops.linear import DenseLinear, PackedLinear
from minivllm.ops.op import OpSpec

# Half a unit of the output, and what the float32 sums lose.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(1, 32), (17, 48), (33, 64), (64, 100), (100, 256), (130, 5), (257, 96)]  # (N, K)
NUM_ROWS = [0, 1, 2, 3, 7, 16, 17, 33, 65]
OWN_ISAS = ("avx512_bf16",)
pytestmark = pytest.mark.usefixtures("isa")


def matrix(rows, columns, dtype):
    return torch.randn(rows, columns).div(columns**0.5).to(dtype)


def packed(weight, cls=PackedLinear):
    layer = cls(*weight.shape, weight.dtype)
    layer.load_rows(0, weight)
    return layer


def packed_as(dtype, weight):
    layer = PackedLinear(*weight.shape, dtype)
    layer.load_rows(0, weight)
    return layer


@pytest.mark.parametrize("cls", [PackedLinear, DenseLinear])
@pytest.mark.parametrize("n, k", SHAPES)
def test_every_shape_agrees_with_float64(dtype, cls, n, k, assert_close):
    weight, bias = matrix(n, k, dtype), torch.randn(n)
    layer = packed(weight, cls)
    for m in NUM_ROWS:
        x = torch.randn(m, k).to(dtype)
        exact = x.double() @ weight.double().t()
        assert_close(layer(x), exact, TOLERANCE[dtype])
        assert_close(layer(x, bias), exact + bias.double(), TOLERANCE[dtype])
        narrow = bias.to(dtype)
        assert_close(layer(x, narrow, torch.float32), exact + narrow.double(), TOLERANCE[torch.float32])


def test_a_wide_sum_stays_accurate(dtype, assert_close):
    weight, x = matrix(40, 4096, dtype), torch.randn(3, 4096).to(dtype)
    assert_close(packed(weight)(x, out_dtype=torch.float32), x.double() @ weight.double().t(), 1e-5)


def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype, num_threads, assert_same_bits):
    for n, k in [(257, 96), (100, 50)]:
        layer, x = packed(matrix(n, k, dtype)), torch.randn(1000, k).to(dtype)
        whole = layer(x)
        for row in (0, 1, 15, 16, 31, 500, 999):
            assert_same_bits(layer(x[row : row + 1]), whole[row : row + 1])
        for size in (2, 6, 7, 17, 33):
            assert_same_bits(layer(x[100 : 100 + size]), whole[100 : 100 + size])


def test_blocks_of_rows_cannot_be_seen(dtype, assert_same_bits):
    layer, x = packed(matrix(33, 8192, dtype)), torch.randn(150, 8192).to(dtype)  # several blocks of 1 MiB
    whole = layer(x)
    assert_same_bits(torch.cat([layer(part) for part in x.split(41)]), whole)


def test_the_number_of_threads_cannot_be_seen(dtype, assert_same_bits):
    layer, x = packed(matrix(500, 700, dtype)), torch.randn(19, 700).to(dtype)
    before, results = native.lib.num_threads(), []
    for n in (1, 2, 5):
        native.lib.set_num_threads(n)
        results.append(layer(x))
    native.lib.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("k", [32, 77])
def test_rows_loaded_in_pieces_equal_rows_loaded_at_once(dtype, k, assert_same_bits):
    weight, x = matrix(150, k, dtype), torch.randn(5, k).to(dtype)
    pieces = PackedLinear(150, k, dtype)
    for start, stop in [(97, 150), (0, 1), (1, 40), (40, 97)]:
        pieces.load_rows(start, weight[start:stop])
    assert_same_bits(pieces(x), packed(weight)(x))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_of_any_dtype_is_converted_as_torch_does(dtype, source, assert_same_bits):
    weight = matrix(70, 41, source)
    assert_same_bits(packed_as(dtype, weight).rows(torch.arange(70)), weight.float().to(dtype))


EDGES = [0.0, -0.0, 1.00390625, 1.01171875, -1.00390625, 65519.0, 65520.0, 3.3961775e38, 1e-40, 6e-8, 3e-8]


@pytest.mark.parametrize("width", [1, 16, 35])
def test_outputs_round_to_nearest_even_and_keep_infinities_and_nans(isa, dtype, width, assert_same_bits):
    x = torch.tensor([*EDGES, float("inf"), -float("inf")]).repeat(3)[:, None]
    if isa == "amx" and dtype == torch.bfloat16:
        x[x.abs() < 2**-126] = 0.0  # its conversion knows no subnormals
    ones = packed(torch.ones(width, 1))
    assert_same_bits(ones(x, out_dtype=dtype) + 0, (x + 0.0).expand(-1, width).to(dtype) + 0)
    assert ones(torch.tensor([[float("nan")]]), out_dtype=dtype).isnan().all()


def test_edge_values_are_packed_as_torch_rounds_them(dtype, assert_same_bits):
    weight = torch.tensor([EDGES])
    assert_same_bits(packed_as(dtype, weight).rows(torch.tensor([0])), weight.to(dtype))
    assert packed_as(dtype, torch.tensor([[float("nan")]])).rows(torch.tensor([0])).isnan().all()


def test_rows_come_back_exactly(dtype, num_threads, assert_same_bits):
    weight = matrix(131, 77, dtype)
    ids = torch.tensor([130, 0, 64, 64, 31])
    assert_same_bits(packed(weight).rows(ids), weight[ids])
    assert packed(weight).rows(torch.empty(0, dtype=torch.int64)).shape == (0, 77)


@pytest.mark.parametrize("cls", [PackedLinear, DenseLinear])
@pytest.mark.parametrize("row", [-1, 131])
def test_a_row_that_is_not_there_is_an_error(cls, row):
    with pytest.raises(IndexError):
        packed(matrix(131, 8, torch.float32), cls).rows(torch.tensor([row]))


def test_columns_and_rows_of_a_larger_weight_are_packed_where_they_lie(dtype, assert_same_bits):
    whole, x = matrix(90, 128, dtype), torch.randn(4, 64).to(dtype)
    part = whole[::2, 32:96]
    assert_same_bits(packed(part)(x), packed(part.contiguous())(x))
    assert_same_bits(packed(whole.t()[:64, :64])(x), packed(whole.t()[:64, :64].contiguous())(x))


def test_rows_of_a_wider_input_are_read_where_they_lie(dtype, assert_same_bits):
    layer, x = packed(matrix(48, 64, dtype)), torch.randn(20, 200).to(dtype)
    assert_same_bits(layer(x[:, 8:72]), layer(x[:, 8:72].contiguous()))
    assert_same_bits(layer(x[:, 0:128:2]), layer(x[:, 0:128:2].contiguous()))


def test_the_likeliest_output_is_the_largest_one(dtype, num_threads):
    """All there is to it: test_likeliest.py."""
    for n, k in [(33, 64), (500, 70)]:
        layer, x = packed(matrix(n, k, dtype)), torch.randn(40, k).to(dtype)
        for part in (x, x[:1], x[:7]):
            assert layer.likeliest(part)[0].tolist() == layer(part, out_dtype=torch.float32).argmax(-1).tolist()


def test_one_bad_row_does_not_touch_the_others(dtype, assert_same_bits):
    layer, x = packed(matrix(40, 50, dtype)), torch.randn(20, 50).to(dtype)
    good = layer(x)
    x[7, 3] = float("nan")
    spoiled = layer(x)
    assert spoiled[7].isnan().all()
    assert_same_bits(torch.cat([spoiled[:7], spoiled[8:]]), torch.cat([good[:7], good[8:]]))


def test_padding_of_k_never_meets_what_memory_held_before(dtype):
    for _ in range(3):  # freed memory full of NaN is likely to be handed out again
        torch.full((1 << 16,), float("nan"))
        assert packed(matrix(33, 37, dtype))(torch.ones(3, 37).to(dtype)).isfinite().all()


def test_a_weight_packed_for_one_instruction_set_outlives_a_change(dtype, isa, assert_same_bits):
    layer, x = packed(matrix(50, 60, dtype)), torch.randn(3, 60).to(dtype)
    expected = layer(x)
    native.lib.set_isa("avx2")
    assert_same_bits(layer(x), expected)


def test_what_does_not_fit_is_refused():
    layer = PackedLinear(8, 4, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        layer.load_rows(5, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="do not fit"):
        layer.load_rows(0, torch.zeros(4, 5))
    with pytest.raises(ValueError, match="x is"):
        layer(torch.zeros(2, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bias is"):
        layer(torch.zeros(2, 4), torch.zeros(4))


def test_the_packed_size_is_the_matrix_and_little_more(dtype):
    size = PackedLinear(4096, 1024, dtype).nbytes
    assert size == 4096 * 1024 * dtype.itemsize


def test_the_packed_layer_is_preferred_on_a_cpu():
    assert linear.linear.select(OpSpec("cpu", torch.bfloat16)) is PackedLinear
    assert linear.linear.select(OpSpec("cpu", torch.float64)) is DenseLinear


# Epilogues -------------------------------------------------------------------

LAYERS = [PackedLinear, DenseLinear]


def gated(weight, cls=PackedLinear):
    layer = cls(*weight.shape, weight.dtype, gated=True)
    half = weight.shape[0] // 2
    layer.load_rows(half, weight[half:])  # as a checkpoint has them: two tensors
    layer.load_rows(0, weight[:half])
    return layer


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("m, n", [(1, 75), (17, 96), (70, 75), (70, 96)])  # 96: whole panels, as models have them
def test_adding_to_the_residual_equals_adding_afterwards(dtype, cls, m, n, assert_same_bits):
    layer, x, bias = packed(matrix(n, 600, dtype), cls), torch.randn(m, 600).to(dtype), torch.randn(n)
    residual = torch.randn(m, n).to(dtype)
    expected = residual + layer(x, bias)
    layer.add_to(residual, x, bias)
    assert_same_bits(residual, expected)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("m, inner, k", [(1, 16, 64), (5, 37, 50), (70, 130, 1100), (70, 64, 1100)])
def test_the_gated_projection_equals_the_activation_of_the_plain_one(dtype, cls, m, inner, k, assert_same_bits):
    weight, x = matrix(2 * inner, k, dtype), torch.randn(m, k).to(dtype)
    bias, addend = torch.randn(2 * inner), torch.randn(m, 2 * inner)
    for options in ({}, {"bias": bias}, {"bias": bias, "addend": addend}):
        plain = packed(weight, cls)(x, **options)
        expected = activation.cpu(plain) if cls is PackedLinear else activation.reference(plain)
        assert_same_bits(gated(weight, cls).silu_mul(x, **options), expected)


@pytest.mark.parametrize("cls", LAYERS)
def test_an_addend_joins_the_sum_before_it_is_rounded(dtype, cls, assert_close):
    layer, x, bias = packed(matrix(75, 96, dtype), cls), torch.randn(20, 96).to(dtype), torch.randn(75)
    addend = torch.randn(20, 150)[:, :75]  # rows of something wider
    exact = layer(x, out_dtype=torch.float32).double() + addend + bias
    assert_close(layer(x, bias, addend=addend), exact, TOLERANCE[dtype])
    residual = torch.zeros(20, 75, dtype=dtype)
    layer.add_to(residual, x, bias, addend=addend)
    assert torch.equal(residual, layer(x, bias, addend=addend))


def test_an_addend_of_zeros_changes_nothing(dtype, assert_same_bits):
    layer, x = packed(matrix(75, 96, dtype)), torch.randn(20, 96).to(dtype)
    assert_same_bits(layer(x, addend=torch.zeros(20, 75)) + 0, layer(x) + 0)


@pytest.mark.parametrize("cls", LAYERS)
def test_the_output_can_be_given(dtype, cls, assert_same_bits):
    layer, x = packed(matrix(75, 96, dtype), cls), torch.randn(20, 96).to(dtype)
    wide = torch.full((20, 100), 7.0, dtype=dtype)
    assert layer(x, out=wide[:, 5:80]).data_ptr() == wide[:, 5:80].data_ptr()
    assert_same_bits(wide[:, 5:80].contiguous(), layer(x))
    assert (wide[:, :5] == 7).all() and (wide[:, 80:] == 7).all()


@pytest.mark.parametrize("n", [1090, 1088])  # rows of no whole cache line, and of whole ones
def test_an_output_past_the_caches_has_the_same_bits(dtype, n, assert_same_bits):
    layer, x = packed(matrix(n, 32, dtype)), torch.randn(4100, 32).to(dtype)
    aligned = torch.empty(4100, 1152, dtype=dtype)[:, :n]
    assert_same_bits(layer(x, out=aligned).contiguous(), layer(x, out=torch.empty(4100, n + 1, dtype=dtype)[:, 1:]))


def test_a_large_product_has_the_bits_of_its_rows_alone(dtype, num_threads, assert_same_bits):
    """Enough rows for blocks of each thread's own, enough of K for several chunks, panels that are whole."""
    layer, x = packed(matrix(160, 2500, dtype)), torch.randn(1100, 2500).to(dtype)
    whole = layer(x)
    assert_same_bits(torch.cat([layer(part) for part in x.split(100)]), whole)
    assert_same_bits(layer(x, addend=torch.zeros(1100, 160)) + 0, whole + 0)  # another way to the output


def test_outputs_and_addends_that_do_not_fit_are_refused(dtype):
    layer, x = packed(matrix(8, 4, dtype)), torch.zeros(2, 4, dtype=dtype)
    with pytest.raises(ValueError, match="the output is"):
        layer(x, out=torch.zeros(3, 8, dtype=dtype))
    with pytest.raises(ValueError, match="the output is"):
        layer(x, out=torch.zeros(8, 2, dtype=dtype).t())
    with pytest.raises(ValueError, match="addend is"):
        layer(x, addend=torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="residual is"):
        layer.add_to(torch.zeros(2, 8, dtype=torch.float64), x)
