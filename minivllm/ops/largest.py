"""The largest magnitude among numbers: whether a checkpoint's are numbers at all, and fit a type, is seen by it."""

from __future__ import annotations

import torch

from minivllm.ops import native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op


def reference(x: torch.Tensor) -> float:
    """max |x|, any shape, contiguous; NaN if one number is, 0 if there are none."""
    return x.abs().max().item() if x.numel() else 0.0


def cpu(x: torch.Tensor) -> float:
    """The native `reference`, at the pace of memory."""
    require("x", x, x.dtype, x.shape)
    return native.lib.largest_magnitude(native.dtype_code(x), x.data_ptr(), x.numel())


IMPLEMENTATIONS = [Impl(cpu, why_not=native.why_not), Impl(reference)]
largest_magnitude = Op("largest_magnitude", IMPLEMENTATIONS)
