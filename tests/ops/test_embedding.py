"""Token embedding: the native gather against the reference."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import native
from minivllm.ops.embedding import cpu, embedding, reference
from minivllm.ops.op import OpSpec

CPU = OpSpec("cpu", torch.bfloat16)
gathers = pytest.mark.parametrize(
    "gather",
    [reference, pytest.param(cpu, marks=pytest.mark.skipif(bool(native.why_not(CPU)), reason="no native kernels"))],
)


@gathers
def test_each_token_gets_its_row(gather):
    weight = torch.arange(12.0).reshape(4, 3)
    assert gather(torch.tensor([2, 0, 2]), weight).tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]


@gathers
def test_no_tokens_give_no_rows(gather):
    assert gather(torch.empty(0, dtype=torch.int64), torch.zeros(4, 3)).shape == (0, 3)


@gathers
@pytest.mark.parametrize("token", [4, -1])
def test_an_id_outside_the_vocabulary_is_an_error(gather, token):
    with pytest.raises(IndexError):
        gather(torch.tensor([1, token]), torch.zeros(4, 3))


@pytest.mark.parametrize("width", [1, 7, 64, 1000])
@pytest.mark.parametrize("num_ids", [1, 33, 700])
def test_the_native_rows_have_the_references_bits(isa, dtype, num_threads, width, num_ids, assert_same_bits):
    weight = torch.randn(211, width).to(dtype)
    weight[7] = float("nan")
    ids = torch.randint(0, 211, (num_ids,))
    ids[0], ids[-1] = 7, 210
    assert_same_bits(cpu(ids, weight), reference(ids, weight))


@pytest.mark.skipif(bool(native.why_not(CPU)), reason="no native kernels")
def test_what_the_gather_would_misread_is_refused():
    weight, ids = torch.zeros(4, 6), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="weight is"):
        cpu(ids, weight.t())
    with pytest.raises(ValueError, match="ids is"):
        cpu(ids.int(), weight)


def test_a_cpu_gathers_natively_if_it_can_and_by_torch_otherwise():
    assert embedding.select(CPU) is (reference if native.why_not(CPU) else cpu)
    assert embedding.select(OpSpec("cpu", torch.float64)) is reference
