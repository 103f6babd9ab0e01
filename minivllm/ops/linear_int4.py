"""Linear layers whose weights are codes of 4 bits, made from a checkpoint of floats as it is loaded; x is made int8.

A weight is scale × multiplier × code: a float32 scale for each output feature, a whole multiplier in [1, 16] for each
group of 128 along K, and a code in [-8, 7]. (Group scales that are whole multiples of the channel's: Lin et al. 2024,
QServe, arXiv:2405.04532.) So multiplier × code is an int8, and all else is as in `ops/linear_int8.py`: x by rows, int32
sums that are exact over all of K, the same bits for a row in any batch and on any instruction set.

To the nearest, without looking at data: of the least multiplier that cuts nothing off and the six below it, the one of
the least squared error.
"""

from __future__ import annotations

from typing import Any

import torch

from minivllm.ops import native
from minivllm.ops.linear import PackedLinear
from minivllm.ops.linear_int8 import DenseInt8Linear, native_why_not, reference_why_not, scale_rows
from minivllm.ops.op import Impl, Op

GROUP = 128
_MOST_MULTIPLIER, _LEAST_CODE, _MOST_CODE = 16, -8, 7
_TRIED_MULTIPLIERS = 7
_PARTS = 16  # a weight is made whole in 16ths of its feature's scale first, so that errors are exact


def quantise_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] of any float dtype -> multiplier × code, in [-128, 112] as float32 [N, K], scales float32 [N, 1]."""
    n, k = weight.shape
    numbers, scales = scale_rows(weight, float(_PARTS * _MOST_CODE * _MOST_MULTIPLIER))
    groups = torch.nn.functional.pad(numbers.round(), (0, -k % GROUP)).view(n, -1, GROUP)
    first = (groups.abs().amax(-1, keepdim=True) / (_PARTS * _MOST_CODE)).ceil().clamp(min=1)
    least = torch.full(first.shape, torch.inf, dtype=torch.float64)
    best = torch.zeros_like(groups)
    for fewer in range(_TRIED_MULTIPLIERS):
        multiplier = (first - fewer).clamp(min=1)
        unit = _PARTS * multiplier
        codes = (groups * (1 / unit)).clamp(_LEAST_CODE, _MOST_CODE).round()
        error = (groups - codes * unit).double().square().sum(-1, keepdim=True)
        best = torch.where(error < least, codes * multiplier, best)
        least = torch.minimum(error, least)
    return best.view(n, -1)[:, :k], scales * _PARTS


class DenseInt4Linear(DenseInt8Linear):
    """The specification; it keeps multiplier × code, in a byte each."""

    quantise_weight = staticmethod(quantise_weight)


class PackedInt4Linear(PackedLinear):
    """`DenseInt4Linear` in C++, half a byte and little more a weight."""

    def _make_format(self, *sizes: int) -> Any:
        return native.lib.Int4LinearFormat(*sizes)


IMPLEMENTATIONS = [
    Impl(PackedInt4Linear, why_not=native_why_not),
    Impl(DenseInt4Linear, why_not=reference_why_not),
]
int4_linear = Op("int4_linear", IMPLEMENTATIONS)
