"""The Triton kernels through the interpreter, each against a float64 reference: the table that `tests/gpu` runs on a card."""

from __future__ import annotations

import pytest

import tests.gpu.interpreter  # noqa: F401  before the kernels
from tests.gpu.case import max_diff
from tests.gpu.cases import ALL_CASES


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ALL_CASES)
def test_a_kernel_agrees_with_its_reference(name):
    check = ALL_CASES[name]("cpu", False)
    difference = max_diff(check.run(), check.expected())
    assert difference <= check.tolerance, f"max_diff {difference:.3g} > {check.tolerance:.3g}"
