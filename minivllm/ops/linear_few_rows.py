"""Linear layers on a GPU whose products of few rows are CUDA C++'s, which reads a weight faster than cuBLAS or Triton.

What such a product is followed by (bias, residual, a gate's SiLU) is part of it. More rows, and what the kernel does
not take, are the base class's: so a row's bits depend on how many there are, and `--batch-invariant` has none of this.
"""

from __future__ import annotations

import torch

from minivllm.ops import cuda
from minivllm.ops.linear import check_input
from minivllm.ops.linear_cuda import CublasLinear
from minivllm.ops.triton.linear import TritonFp8Linear, TritonInt8Linear

_STORE, _ADD_RESIDUAL, _SILU_MUL = 0, 1, 2  # as in csrc/cuda/few_rows_sizes.h


class _FewRows:
    """The calls of `DenseLinear`. Has `_operands(x)`: x as it is multiplied, the weight, their scales."""

    def __call__(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        *,
        addend: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_input(self, x, bias, addend)
        if len(x) > cuda.MOST_FEW_ROWS:
            return super().__call__(x, bias, out_dtype, addend=addend, out=out)
        to = torch.empty(len(x), self.out_features, dtype=out_dtype or x.dtype, device=x.device) if out is None else out
        if not cuda.few_rows_fits(to, x, bias, addend):
            return super().__call__(x, bias, out_dtype, addend=addend, out=out)
        return self._multiply_few(_STORE, to, x, bias, addend)

    def add_to(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        addend: torch.Tensor | None = None,
    ) -> None:
        check_input(self, x, bias, addend)
        if residual.dtype != x.dtype or not cuda.few_rows_fits(residual, x, bias, addend):
            return super().add_to(residual, x, bias, addend=addend)
        self._multiply_few(_ADD_RESIDUAL, residual, x, bias, addend)

    def silu_mul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        addend: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_input(self, x, bias, addend)
        if len(x) > cuda.MOST_FEW_ROWS:
            return super().silu_mul(x, bias, addend=addend, out=out)
        to = torch.empty(len(x), self.out_features // 2, dtype=x.dtype, device=x.device) if out is None else out
        if not cuda.few_rows_fits(to, x, bias, addend):
            return super().silu_mul(x, bias, addend=addend, out=out)
        return self._multiply_few(_SILU_MUL, to, x, bias, addend)

    def _multiply_few(
        self,
        epilogue: int,
        out: torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        addend: torch.Tensor | None,
    ) -> torch.Tensor:
        x_operand, weight, *scales = self._operands(x)
        is_bf16 = x.dtype == torch.bfloat16
        return cuda.few_rows(epilogue, out, x_operand, weight, bias, addend, *scales, is_bf16=is_bf16)


class FewRowsLinear(_FewRows, CublasLinear):
    """`DenseLinear`."""

    def _operands(self, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return x, self._weight, None, None


class FewRowsInt8Linear(_FewRows, TritonInt8Linear):
    """`DenseInt8Linear`."""


class FewRowsFp8Linear(_FewRows, TritonFp8Linear):
    """`DenseFp8Linear`."""
