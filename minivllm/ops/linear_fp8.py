"""Linear layers in float8 (e4m3), made from a checkpoint of floats as it is loaded. For cards that multiply it.

As `ops/linear_int8.py`: a weight has one scale for each output feature, x one for each row, found when it comes; the
largest magnitude is 448. Products are exact, sums float32. No --quantization asks for it yet (docs/gpu.md).
"""

from __future__ import annotations

import torch

from minivllm.ops import gpu
from minivllm.ops.linear_int8 import LEAST_AMAX, DenseQuantizedLinear
from minivllm.ops.op import Impl, Op, OpSpec

_MOST = 448.0


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] of any float dtype -> float8_e4m3fn [M, K], scales float32 [M, 1]; NaN for a row that is not finite."""
    wide = x.float()
    amax = wide.abs().amax(-1, keepdim=True) if x.shape[1] else wide.new_zeros(len(x), 1)
    usable = amax.isfinite() & (amax >= LEAST_AMAX)
    reciprocal = torch.full_like(amax, _MOST) / torch.where(usable, amax, _MOST)
    q = (torch.where(usable, wide, 0) * reciprocal).clamp(-_MOST, _MOST).to(torch.float8_e4m3fn)
    return q, torch.where(usable, amax / _MOST, torch.where(amax.isfinite(), 0.0, torch.nan))


class DenseFp8Linear(DenseQuantizedLinear):
    """The specification."""

    codes, quantise = torch.float8_e4m3fn, staticmethod(quantise_rows)


def why_not(spec: OpSpec) -> str | None:
    if reason := gpu.why_not(spec):
        return reason
    return None if gpu.has_fp8(spec.device) else "float8 needs compute capability 8.9"


IMPLEMENTATIONS = [Impl("triton.linear:TritonFp8Linear", why_not), Impl(DenseFp8Linear)]
fp8_linear = Op("fp8_linear", IMPLEMENTATIONS)
