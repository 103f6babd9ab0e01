"""The largest magnitude: the native kernel against the reference, and what is no number."""

from __future__ import annotations

import math

import pytest
import torch

from minivllm.ops import largest

pytestmark = pytest.mark.usefixtures("isa", "num_threads")


@pytest.mark.parametrize("size", [0, 1, 7, 33, 4097, (1 << 17) + 3])
def test_it_is_the_references(dtype, size):
    for x in (torch.randn(size).to(dtype), torch.zeros(size, dtype=dtype), -torch.rand(size).to(dtype)):
        assert largest.cpu(x) == largest.reference(x)


@pytest.mark.parametrize("place", [0, 50_000, (1 << 17) + 2])
def test_one_that_is_not_finite_is_found_wherever_it_is(dtype, place):
    x = torch.randn((1 << 17) + 3).to(dtype)
    for sign in (1, -1):
        x[place] = sign * math.inf
        assert largest.cpu(x) == largest.reference(x) == math.inf
        x[place] = sign * math.nan
        x[place - 1] = math.inf
        assert math.isnan(largest.cpu(x)) and math.isnan(largest.reference(x))
        x[place - 1] = 0


def test_it_is_read_without_its_gaps():
    with pytest.raises(ValueError, match="must be"):
        largest.cpu(torch.zeros(4, 6)[:, 1:])
