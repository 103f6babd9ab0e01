"""What a kernel is checked by: one table of cases for the interpreter, the compiler and a card."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

Result: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Check(NamedTuple):
    """A kernel on its inputs, and what it must give. Neither changes an input."""

    run: Callable[[], Result]
    expected: Callable[[], Result]
    tolerance: float  # of |got - expected| / (1 + |expected|); 0 for the same bits


# Makes its inputs on a device: small ones for the interpreter, or as large as they are in use.
Case = Callable[[str, bool], Check]


def max_diff(got: Result, expected: Result) -> float:
    """The largest difference relative to 1 + |expected|; NaN and infinities agree only with themselves."""
    if isinstance(got, tuple):
        return max(max_diff(*pair) for pair in zip(got, expected, strict=True))
    assert got.shape == expected.shape, f"{tuple(got.shape)} is not {tuple(expected.shape)}"
    if not got.numel():
        return 0.0
    got, expected = got.double(), expected.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    diff = ((got - expected).abs() / (1 + expected.abs())).nan_to_num(torch.inf, torch.inf)
    return torch.where(same, 0.0, diff).max().item()


def randn(device: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """The same numbers each time, though others on another device."""
    numbers = torch.randn(
        shape, device=device, generator=torch.Generator(device).manual_seed(seed + sum(shape))
    )
    return numbers.to(dtype)


def ints(device: str, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
