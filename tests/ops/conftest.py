"""What the kernel tests share: each instruction set, each thread count, and how far apart two tensors are."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import native

ISAS = native.lib.supported_isas() if native.lib is not None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS or [pytest.param("none", marks=pytest.mark.skip("no native kernels here"))])
def isa(request):
    """Each instruction set this machine has, in use for the length of the test."""
    before = native.lib.isa()
    native.lib.set_isa(request.param)
    yield request.param
    native.lib.set_isa(before)


@pytest.fixture(params=[1, 2, 3])
def num_threads(request):
    """Each thread count, in use for the length of the test."""
    before = native.lib.num_threads()
    native.lib.set_num_threads(request.param)
    yield request.param
    native.lib.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def assert_close():
    """assert_close(got, expected, tolerance): the largest difference, relative to 1 + |expected|."""

    def check(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        assert got.shape == expected.shape
        got, expected = got.double(), expected.double()
        max_diff = ((got - expected).abs() / (1 + expected.abs())).max().item() if got.numel() else 0.0
        assert max_diff <= tolerance, f"max_diff {max_diff:.3g} > {tolerance:.3g}"

    return check


@pytest.fixture
def assert_same_bits():
    """assert_same_bits(a, b): equal to the last bit, NaN included."""

    def check(a: torch.Tensor, b: torch.Tensor) -> None:
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

    return check
