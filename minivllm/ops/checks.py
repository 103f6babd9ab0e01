"""What a kernel must be told before it follows a pointer: that a tensor is laid out as it expects."""

from __future__ import annotations

import torch


def require(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, dense: int = -1
) -> None:
    """Raise ValueError unless `tensor` has this dtype and shape and its last `dense` dimensions are contiguous.

    dense: -1 for all of them; the other dimensions may have any stride.
    """
    first = 0 if dense < 0 else tensor.dim() - dense
    if tensor.dtype != dtype or tensor.shape != shape or not _is_dense(tensor, first):
        extent = "contiguous" if first == 0 else f"contiguous in its last {dense} dimension(s)"
        raise ValueError(
            f"{name} is {list(tensor.shape)} {tensor.dtype} of strides {list(tensor.stride())}; "
            f"it must be {list(shape)} {dtype}, {extent}"
        )


def _is_dense(tensor: torch.Tensor, first: int) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape[first:]), reversed(tensor.stride()[first:])):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
