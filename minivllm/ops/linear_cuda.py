"""`ops/linear.py` by cuBLAS: a plain matrix on the device, multiplied in its own type with float32 sums.

cuBLAS chooses its kernel by the number of rows, so a row's bits may depend on how many others there are. With
`--batch-invariant` one Triton kernel serves every number of rows instead.
"""

from __future__ import annotations

import torch

from minivllm.ops.activation import silu_mul
from minivllm.ops.linear import DenseLinear, check_input
from minivllm.ops.op import OpSpec


class CublasLinear(DenseLinear):
    def _allocate(self, device: str) -> None:
        super()._allocate(device)
        if self.gated:
            self._activate = silu_mul.select(OpSpec(device, self.dtype))

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
        out_dtype = out_dtype or x.dtype
        if addend is not None:
            y = self._sums(x, bias, addend).to(out_dtype)
        elif out_dtype == x.dtype:
            y = self._multiply(x, bias)
        else:
            y = self._multiply_to(x, out_dtype)
            if bias is not None:
                y += bias
        return y if out is None else out.copy_(y)

    def add_to(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        addend: torch.Tensor | None = None,
    ) -> None:
        if bias is not None or addend is not None:
            super().add_to(residual, x, bias, addend=addend)
            return
        check_input(self, x, None, None)
        self._add(residual, x)

    def _sums(self, x: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor | None) -> torch.Tensor:
        y = self._multiply_to(x, torch.float32)
        if addend is not None:
            y += addend
        if bias is not None:
            y += bias
        return y

    # The product itself ------------------------------------------------------------

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(x, self._weight, bias)

    def _multiply_to(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The product, rounded once to a wider type than x's."""
        if x.dtype == dtype:
            return self._multiply(x, None)
        if x.is_cuda and dtype == torch.float32:
            return torch.mm(x, self._weight.t(), out_dtype=dtype)
        return (x.float() @ self._weight.float().t()).to(dtype)  # only where a test runs this on a CPU

    def _add(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += the product, rounded once."""
        residual.addmm_(x, self._weight.t())
