"""The likeliest token of each row, chosen as products are made: what is chosen from the logits, to the last tie."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import native
from minivllm.ops.linear import DenseLinear, PackedLinear
from minivllm.ops.linear_int4 import DenseInt4Linear, PackedInt4Linear
from minivllm.ops.linear_int8 import DenseInt8Linear, PackedInt8Linear
from minivllm.ops.sampling import gumbel_argmax_cpu, gumbel_argmax_reference

INF, NAN = float("inf"), float("nan")
VOCABULARIES = [1, 5, 16, 31, 32, 33, 100, 257, 1024, 4099]
NUM_ROWS = [0, 1, 2, 3, 7, 15, 16, 17, 32, 33, 48, 63, 64, 65, 70]
pytestmark = pytest.mark.usefixtures("isa")
both_weights = pytest.mark.parametrize("cls", [PackedLinear, PackedInt8Linear])
all_weights = pytest.mark.parametrize("cls", [PackedLinear, PackedInt8Linear, PackedInt4Linear])


def packed(weight: torch.Tensor, dtype: torch.dtype, cls: type):
    layer = cls(*weight.shape, dtype)
    layer.load_rows(0, weight)
    return layer


def assert_chosen_from_logits(layer, x: torch.Tensor) -> tuple[list[int], list[int]]:
    """What is chosen, after a look at whether it is what the sampler chooses from the logits."""
    rows, logits = len(x), layer(x, out_dtype=torch.float32)
    zeros = torch.zeros(rows, dtype=torch.int64)
    tokens, broken = layer.likeliest(x)
    assert (tokens.dtype, broken.dtype, tokens.shape, broken.shape) == (torch.int64, torch.uint8, (rows,), (rows,))
    for choose in (gumbel_argmax_cpu, gumbel_argmax_reference):
        if not rows:
            continue
        expected, expected_broken = choose(logits, torch.zeros(rows), zeros, zeros)
        assert torch.equal(broken, expected_broken)
        assert torch.equal(tokens[broken == 0], expected[broken == 0])
    return tokens.tolist(), broken.tolist()


@both_weights
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_it_is_what_the_sampler_chooses_from_the_logits(dtype, num_threads, cls, vocab_size):
    layer = packed(torch.randn(vocab_size, 70), dtype, cls)
    for rows in NUM_ROWS:
        assert_chosen_from_logits(layer, torch.randn(rows, 70).to(dtype))


@both_weights
@pytest.mark.parametrize("vocab_size", [64, 1000])
def test_the_lowest_of_equal_ones_is_chosen(dtype, num_threads, cls, vocab_size):
    directions = torch.randn(7, 64)  # each many times over, so that every row has ties in all panels
    layer = packed(directions[torch.randint(7, (vocab_size,))], dtype, cls)
    for rows in (1, 16, 33, 70):
        assert_chosen_from_logits(layer, torch.randn(rows, 64).to(dtype))
    assert assert_chosen_from_logits(layer, torch.zeros(5, 64, dtype=dtype)) == ([0] * 5, [0] * 5)


@both_weights
@pytest.mark.parametrize("place", [0, 31, 32, 555, 998])
@pytest.mark.parametrize("rows", [1, 40])
def test_it_is_found_wherever_it_is(dtype, num_threads, cls, place, rows):
    weight = torch.randn(999, 64)
    weight[place] = 8.0
    layer = packed(weight, dtype, cls)
    assert assert_chosen_from_logits(layer, torch.rand(rows, 64).to(dtype) + 1) == ([place] * rows, [0] * rows)


def test_zeros_of_either_sign_are_equal(dtype):
    weight = torch.zeros(100, 1)
    weight[[0, 1]] = -1.0
    weight[[40, 41]] = torch.tensor([[-1e-45], [0.0]])
    layer = packed(weight, dtype, PackedLinear)
    assert_chosen_from_logits(layer, torch.tensor([[1.0], [-0.0], [0.0], [1e-30], [-1e-30]]).to(dtype))


@both_weights
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_is_broken_and_the_others_are_not(dtype, num_threads, cls, value):
    layer = packed(torch.randn(300, 48), dtype, cls)
    for rows in (1, 20, 70):
        x = torch.randn(rows, 48).to(dtype)
        x[rows // 2, 5] = value
        _, broken = assert_chosen_from_logits(layer, x)
        assert broken == [int(row == rows // 2) for row in range(rows)]


@pytest.mark.parametrize("place", [0, 37, 299])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_output_that_is_not_finite_is_seen_wherever_it_is(dtype, num_threads, place, value):
    weight = torch.randn(300, 48)
    weight[place, 5] = value
    layer, x = packed(weight, dtype, PackedLinear), torch.rand(33, 48).to(dtype) + 1
    _, broken = assert_chosen_from_logits(layer, x)
    assert broken == [int(value != -INF)] * 33  # what is -inf is masked, no more


def test_a_row_of_nothing_but_masked_outputs_is_broken(dtype):
    layer = packed(torch.full((77, 1), -INF), dtype, PackedLinear)
    assert assert_chosen_from_logits(layer, torch.ones(20, 1, dtype=dtype))[1] == [1] * 20


@all_weights
def test_neither_threads_nor_the_batch_can_be_seen(dtype, cls):
    layer, x = packed(torch.randn(5000, 96), dtype, cls), torch.randn(70, 96).to(dtype)
    before, expected = native.lib.num_threads(), assert_chosen_from_logits(layer, x)
    for n in (1, 2, 3, 5):
        native.lib.set_num_threads(n)
        for _ in range(5):
            assert [each.tolist() for each in layer.likeliest(x)] == [*expected]
        assert [layer.likeliest(x[r : r + 1])[0].item() for r in range(70)] == expected[0]
    native.lib.set_num_threads(before)


@all_weights
def test_many_rows_are_chosen_for_in_blocks(dtype, cls):
    layer = packed(torch.randn(100, 40), dtype, cls)
    assert_chosen_from_logits(layer, torch.randn(1100, 40).to(dtype))


def test_rows_of_a_wider_input_are_read_where_they_lie(dtype):
    layer, x = packed(torch.randn(48, 64), dtype, PackedLinear), torch.randn(20, 200).to(dtype)
    assert_chosen_from_logits(layer, x[:, 8:72])
    assert_chosen_from_logits(layer, x[:, 0:128:2])


def test_an_input_that_does_not_fit_is_an_error(dtype):
    layer = packed(torch.randn(48, 64), dtype, PackedLinear)
    with pytest.raises(ValueError, match=r"x is \(3, 63\)"):
        layer.likeliest(torch.zeros(3, 63, dtype=dtype))


@pytest.mark.parametrize(
    ("ours", "specified"),
    [(PackedLinear, DenseLinear), (PackedInt8Linear, DenseInt8Linear), (PackedInt4Linear, DenseInt4Linear)],
)
def test_the_specification_chooses_the_same_where_sums_are_exact(ours, specified):
    weight, x = (torch.randint(-1, 2, (rows, 32)).float() for rows in (500, 40))  # int8 ±127, int4 ±112: as exact
    weight[:, 0] = x[:, 0] = 1  # scales are equal
    for layer in (packed(weight, torch.float32, ours), packed(weight, torch.float32, specified)):
        tokens, broken = layer.likeliest(x)
        assert torch.equal(tokens, (exact := x @ weight.t()).eq(exact.amax(1, keepdim=True)).int().argmax(1))
        assert not broken.any()
