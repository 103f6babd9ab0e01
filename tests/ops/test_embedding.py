"""Token embedding."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops.embedding import embedding, reference
from minivllm.ops.op import OpSpec


def test_each_token_gets_its_row():
    weight = torch.arange(12.0).reshape(4, 3)
    assert reference(torch.tensor([2, 0, 2]), weight).tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]


def test_no_tokens_give_no_rows():
    assert reference(torch.empty(0, dtype=torch.int64), torch.zeros(4, 3)).shape == (0, 3)


def test_an_id_outside_the_vocabulary_is_an_error():
    with pytest.raises(IndexError):
        reference(torch.tensor([4]), torch.zeros(4, 3))


def test_the_gather_serves_every_spec():
    assert embedding.select(OpSpec("cpu", torch.bfloat16)) is reference
