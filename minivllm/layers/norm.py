"""RMS normalisation with its weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from minivllm.layers.weight import Weight, weight_of
from minivllm.ops.op import OpSpec
from minivllm.ops.rms_norm import RowNorm, add_rms_norm, rms_norm


class RMSNorm:
    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: str) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.eps = eps
        self._norm = rms_norm.select(OpSpec(device, dtype, {"size": size}))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size] -> the same shape."""
        return self._norm(x, self.weight, self.eps)

    @property
    def of_rows(self) -> RowNorm:
        """The norm as a part of what reads its output."""
        return RowNorm(self.weight, self.eps)

    def weights(self) -> Iterator[Weight]:
        yield weight_of("weight", self.weight)


class GemmaRMSNorm(RMSNorm):
    """Gemma's: the checkpoint holds weight - 1, and nothing is rounded before the weight has multiplied."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: str) -> None:
        super().__init__(size, eps, dtype=dtype, device=device)
        self.weight = torch.empty(size, dtype=torch.float32, device=device)
        self._add_norm = add_rms_norm.select(OpSpec(device, dtype, {"size": size}))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add x to `residual` in place and normalise the sum. (x was normed first: no projection can add it.)"""
        return self._add_norm(x, residual, self.weight, self.eps)

    def weights(self) -> Iterator[Weight]:
        def load_rows(start: int, rows: torch.Tensor) -> None:
            self.weight[start : start + rows.shape[0]] = rows.float() + 1.0

        for weight in super().weights():
            yield replace(weight, load_rows=load_rows)
