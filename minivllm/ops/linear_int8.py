"""Linear layers in int8, made from a checkpoint of floats as it is loaded.

A weight has one scale for each output feature, x one for each row, found when it comes: symmetric, the largest
magnitude is 127. The int32 sums are exact, so a row's bits depend neither on its batch nor on the instruction set.
Rounding: float32(sum) × (row's scale × feature's scale) takes the place of the float32 sum of `ops/linear.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minivllm.ops import cuda, gpu, native
from minivllm.ops.linear import DenseLinear, PackedLinear, check_input, check_rows
from minivllm.ops.op import Impl, Op, OpSpec

MOST_IN_FEATURES = 1 << 17  # 2^17 products of 127 × 128 (an int4 weight may be -128) fit an int32
LEAST_AMAX = 1e-30  # a row of less counts as zero: the reciprocal of its scale could overflow


def scale_rows(x: torch.Tensor, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] of any float dtype -> numbers up to `most` (but for rounding), float32 [M, K], and scales, float32 [M, 1].

    x is about scale × number. The scale of a row that is not finite is NaN.
    """
    wide = x.float()
    amax = wide.abs().amax(-1, keepdim=True) if x.shape[1] else wide.new_zeros(len(x), 1)
    usable = amax.isfinite() & (amax >= LEAST_AMAX)
    reciprocal = torch.full_like(amax, most) / torch.where(usable, amax, most)  # most / x would round twice
    scales = torch.where(usable, amax / most, torch.where(amax.isfinite(), 0.0, torch.nan))
    return torch.where(usable, wide, 0) * reciprocal, scales


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] of any float dtype -> whole numbers in [-127, 127] as float32 [M, K], scales as of `scale_rows`."""
    numbers, scales = scale_rows(x, 127.0)
    return numbers.round(), scales


class DenseScaledLinear(DenseLinear):
    """The specification of weights and inputs that are quantised row by row: a subclass says how, and to what type."""

    code_dtype: torch.dtype
    quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    def _allocate(self, device: str) -> None:
        shape = self.out_features, self.in_features
        self._weight = torch.zeros(shape, dtype=self.code_dtype, device=device)
        self._scales = torch.zeros(self.out_features, 1, device=device)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self._weight, self._scales)

    def load_rows(self, start: int, weight: torch.Tensor) -> None:
        check_rows(self, start, weight)
        rows = slice(start, start + weight.shape[0])
        q, self._scales[rows] = self.quantise_weight(weight)
        self._weight[rows] = q.to(self.code_dtype)

    def quantise_weight(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`quantise` of rows of the weight, where they are made otherwise than those of x."""
        return self.quantise(weight)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """As the base class; dequantised."""
        scales = torch.nn.functional.embedding(ids, self._scales)  # checks the ids
        codes = self._weight.view(torch.uint8)[ids].view(self.code_dtype)  # torch gathers no 8-bit floats everywhere
        return (codes.float() * scales).to(self.dtype)

    def _sums(
        self, x: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor | None
    ) -> torch.Tensor:
        check_input(self, x, bias, addend)
        q, row_scales = self.quantise(x)
        y = (q.double() @ self._weight.double().t()).float() * (row_scales * self._scales.t())
        if addend is not None:
            y = y + addend
        return y if bias is None else y + bias.float()


class DenseInt8Linear(DenseScaledLinear):
    """The specification."""

    code_dtype, quantise = torch.int8, staticmethod(quantise_rows)


class PackedInt8Linear(PackedLinear):
    """`DenseInt8Linear` in C++."""

    def _make_format(self, *sizes: int) -> Any:
        return native.lib.Int8LinearFormat(*sizes)


def _overflow(spec: OpSpec) -> str | None:
    if spec.sizes.get("in_features", 0) > MOST_IN_FEATURES:
        return f"{spec.sizes['in_features']} products could overflow an int32; {MOST_IN_FEATURES} cannot"
    return None


def native_why_not(spec: OpSpec) -> str | None:
    return _overflow(spec) or native.why_not(spec)


def triton_why_not(spec: OpSpec) -> str | None:
    return _overflow(spec) or gpu.why_not(spec)


def reference_why_not(spec: OpSpec) -> str | None:
    """It multiplies in float64, which a GPU would be asked to do for every token."""
    return None if spec.device == "cpu" else f"not on {spec.device}: it multiplies in float64"


def few_rows_why_not(spec: OpSpec) -> str | None:
    return triton_why_not(spec) or cuda.few_rows_why_not(spec)


INVARIANT_IMPLEMENTATIONS = [
    Impl(PackedInt8Linear, why_not=native_why_not),
    Impl("triton.linear:TritonInt8Linear", why_not=triton_why_not),
    Impl(DenseInt8Linear, why_not=reference_why_not),
]
invariant_int8_linear = Op("invariant_int8_linear", INVARIANT_IMPLEMENTATIONS)

# Sums are exact, but what follows them may be rounded elsewhere by another kernel.
IMPLEMENTATIONS = [Impl("linear_few_rows:FewRowsInt8Linear", why_not=few_rows_why_not), *INVARIANT_IMPLEMENTATIONS]
int8_linear = Op("int8_linear", IMPLEMENTATIONS)
