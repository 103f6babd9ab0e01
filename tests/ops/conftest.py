"""What the kernel tests share: each instruction set, each thread count, and how far apart two tensors are."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import native

ISAS = native.lib.supported_isas() if native.lib is not None else []
OF_PRODUCTS = ("avx512_vnni", "avx512_bf16")  # sets that most ops have no kernels of their own for
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pytest_generate_tests(metafunc):
    """`isa` is each set that this machine has; those of products only where the module's OWN_ISAS names them."""
    if "isa" in metafunc.fixturenames:
        own = getattr(metafunc.module, "OWN_ISAS", ())
        isas = [isa for isa in ISAS if isa in own or isa not in OF_PRODUCTS]
        none = pytest.param("none", marks=pytest.mark.skip("no native kernels here"))
        metafunc.parametrize("isa", isas or [none], indirect=True)


def pytest_collection_modifyitems(items):
    """The sets of products see one dtype: with the others `avx512_bf16` does what the set below does, and the products
    of `avx512_vnni` are of integers, whatever they were made of."""
    items[:] = [item for item in items if not _is_seen_elsewhere(getattr(item, "callspec", None))]


def _is_seen_elsewhere(callspec) -> bool:
    params = callspec.params if callspec is not None else {}
    return params.get("isa") in OF_PRODUCTS and params.get("dtype", torch.bfloat16) is not torch.bfloat16


@pytest.fixture
def isa(request):
    """An instruction set, in use for the length of the test."""
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
