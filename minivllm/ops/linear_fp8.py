"""Linear layers in float8 (e4m3), made from a checkpoint of floats as it is loaded. For cards that multiply it.

As `ops/linear_int8.py`: a weight has one scale for each output feature, x one for each row, found when it comes; the
largest magnitude is 448. Products are exact, sums float32.
"""

from __future__ import annotations

import torch

from minivllm.ops import gpu
from minivllm.ops.linear import DenseLinear, check_input, check_rows
from minivllm.ops.op import Impl, Op, OpSpec

_MOST = 448.0
_LEAST_AMAX = 1e-30  # a row of less counts as zero: the reciprocal of its scale could overflow


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] of any float dtype -> float8_e4m3fn [M, K], scales float32 [M, 1]; NaN for a row that is not finite."""
    wide = x.float()
    amax = wide.abs().amax(-1, keepdim=True) if x.shape[1] else wide.new_zeros(len(x), 1)
    usable = amax.isfinite() & (amax >= _LEAST_AMAX)
    reciprocal = torch.full_like(amax, _MOST) / torch.where(usable, amax, _MOST)
    q = (torch.where(usable, wide, 0) * reciprocal).clamp(-_MOST, _MOST).to(torch.float8_e4m3fn)
    return q, torch.where(usable, amax / _MOST, torch.where(amax.isfinite(), 0.0, torch.nan))


class DenseFp8Linear(DenseLinear):
    """The specification."""

    def __init__(
        self, out_features: int, in_features: int, dtype: torch.dtype, *, gated: bool = False
    ) -> None:
        """dtype: of x."""
        super().__init__(out_features, in_features, dtype, gated=gated)
        self._weight = torch.zeros(out_features, in_features, dtype=torch.float8_e4m3fn)
        self._scales = torch.zeros(out_features, 1)

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + self._scales.nbytes

    def load_rows(self, start: int, weight: torch.Tensor) -> None:
        check_rows(self, start, weight)
        rows = slice(start, start + weight.shape[0])
        q, scales = quantise_rows(weight)
        self._weight[rows], self._scales[rows] = q.to(self._weight.device), scales.to(self._scales.device)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """As the base class; dequantised."""
        return (self._weight[ids].float() * self._scales[ids]).to(self.dtype)

    def _sums(self, x: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor | None) -> torch.Tensor:
        check_input(self, x, bias, addend)
        q, row_scales = quantise_rows(x)
        y = (q.double() @ self._weight.double().t()).float() * (row_scales * self._scales.t())
        if addend is not None:
            y = y + addend
        return y if bias is None else y + bias.float()


def why_not(spec: OpSpec) -> str | None:
    if reason := gpu.why_not(spec):
        return reason
    return None if gpu.has_fp8(spec.device) else "float8 needs compute capability 8.9"


IMPLEMENTATIONS = [Impl("triton.linear:TritonFp8Linear", why_not), Impl(DenseFp8Linear)]
fp8_linear = Op("fp8_linear", IMPLEMENTATIONS)
