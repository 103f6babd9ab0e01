"""Linear layers in float8 (e4m3), made from a checkpoint of floats as it is loaded. For cards that multiply it.

As `ops/linear_int8.py`: a weight has one scale for each output feature, x one for each row, found when it comes; the
largest magnitude is 448. Products are exact, sums float32.
"""

from __future__ import annotations

import torch

from minivllm.ops import cuda, gpu
from minivllm.ops.linear_int8 import DenseScaledLinear, scale_rows
from minivllm.ops.op import Impl, Op, OpSpec

_MOST = 448.0


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] of any float dtype -> float8_e4m3fn [M, K], scales float32 [M, 1]; NaN for a row that is not finite."""
    numbers, scales = scale_rows(x, _MOST)
    return numbers.clamp(-_MOST, _MOST).to(torch.float8_e4m3fn), scales


class DenseFp8Linear(DenseScaledLinear):
    """The specification. It serves nobody: it multiplies in float64."""

    code_dtype, quantise = torch.float8_e4m3fn, staticmethod(quantise_rows)


def why_not(spec: OpSpec) -> str | None:
    if reason := gpu.why_not(spec):
        return reason
    return None if gpu.has_fp8(spec.device) else "float8 needs compute capability 8.9"


def few_rows_why_not(spec: OpSpec) -> str | None:
    return why_not(spec) or cuda.few_rows_why_not(spec)


INVARIANT_IMPLEMENTATIONS = [Impl("triton.linear:TritonFp8Linear", why_not)]
invariant_fp8_linear = Op("invariant_fp8_linear", INVARIANT_IMPLEMENTATIONS)

IMPLEMENTATIONS = [Impl("linear_few_rows:FewRowsFp8Linear", few_rows_why_not), *INVARIANT_IMPLEMENTATIONS]
fp8_linear = Op("fp8_linear", IMPLEMENTATIONS)
