"""RMS normalisation with its weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from minivllm.layers.weight import Weight, weight_of
from minivllm.ops.op import OpSpec
from minivllm.ops.rms_norm import rms_norm


class RMSNorm:
    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: str) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.eps = eps
        self._norm = rms_norm.select(OpSpec(device, dtype, {"size": size}))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size] -> the same shape."""
        return self._norm(x, self.weight, self.eps)

    def weights(self) -> Iterator[Weight]:
        yield weight_of("weight", self.weight)
