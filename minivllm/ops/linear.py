"""Linear layers over a weight that is packed once, when it is loaded, into the order the kernel reads.

Owns the packed copy (the only one) and both ways to read it: multiply, and gather rows for tied embeddings.
Knows nothing of checkpoints, sharding or layer names.

One row of x gives the same bits alone and among a thousand: K is summed in a fixed order in float32, never
split over threads, by one instruction family for every number of rows (AMX for bfloat16 where the machine has
it, fused multiply-adds otherwise).
"""

from __future__ import annotations

import torch

from minivllm.ops import native
from minivllm.ops.op import Impl, Op


class DenseLinear:
    """The specification: a plain [out_features, in_features] matrix, multiplied in float32."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        self.out_features, self.in_features, self.dtype = out_features, in_features, dtype
        self._weight = torch.empty(out_features, in_features, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Bytes the packed weight takes."""
        return self._weight.nbytes

    def load_rows(self, start: int, weight: torch.Tensor) -> None:
        """Convert `weight` ([n, in_features], any float dtype) to rows start..start+n of the matrix."""
        _check_rows(self, start, weight)
        self._weight[start : start + weight.shape[0]] = weight

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The weight's rows `ids` ([T] int64) as [T, in_features]; IndexError for a row that is not there."""
        return torch.nn.functional.embedding(ids, self._weight)

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """x @ weight.T + bias, summed in float32 and rounded once to `out_dtype` (default: x's).

        x: [M, in_features] in the weight's dtype, any row stride; bias: [out_features].
        Returns [M, out_features].
        """
        _check_input(self, x, bias)
        y = x.float() @ self._weight.float().t()
        if bias is not None:
            y += bias.float()
        return y.to(out_dtype or x.dtype)


class PackedLinear:
    """`DenseLinear` in C++, its weight packed for the instruction set in use when it is made."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        self.out_features, self.in_features, self.dtype = out_features, in_features, dtype
        self._format = native.lib.LinearFormat(native.DTYPE_CODES[dtype], out_features, in_features)
        # Pages are touched by load_rows, not here. A tile row is a cache line: start on one.
        storage = torch.empty(self._format.nbytes + 63, dtype=torch.uint8)
        start = -storage.data_ptr() % 64
        self._packed = storage[start : start + self._format.nbytes]

    @property
    def nbytes(self) -> int:
        """Bytes the packed weight takes: the matrix's, padded to whole panels."""
        return self._format.nbytes

    def load_rows(self, start: int, weight: torch.Tensor) -> None:
        """Convert `weight` ([n, in_features], any float dtype) and pack it in place as rows start..start+n.

        A memory-mapped tensor is read as it is packed: float32, bfloat16 and float16 are never copied first.
        """
        _check_rows(self, start, weight)
        if weight.dtype not in native.DTYPE_CODES:
            weight = weight.float()
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        if weight.numel():
            self._format.load_rows(
                self._packed.data_ptr(), start,
                weight.data_ptr(), native.dtype_code(weight), weight.stride(0), weight.shape[0],
            )  # fmt: skip

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The weight's rows `ids` ([T] int64) as [T, in_features]; IndexError for a row that is not there."""
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty(ids.shape[0], self.in_features, dtype=self.dtype)
        self._format.gather_rows(out.data_ptr(), self._packed.data_ptr(), ids.data_ptr(), ids.shape[0])
        return out

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """x @ weight.T + bias, summed in float32 and rounded once to `out_dtype` (default: x's).

        x: [M, in_features] in the weight's dtype, any row stride; bias: [out_features].
        Returns [M, out_features].
        """
        _check_input(self, x, bias)
        if x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty(x.shape[0], self.out_features, dtype=out_dtype or x.dtype)
        bias_address, bias_code = 0, 0
        if bias is not None:
            bias = bias.contiguous()
            bias_address, bias_code = bias.data_ptr(), native.dtype_code(bias)
        self._format.multiply(
            out.data_ptr(), native.dtype_code(out), x.data_ptr(), x.stride(0), x.shape[0],
            self._packed.data_ptr(), bias_address, bias_code,
        )  # fmt: skip
        return out


def _check_rows(linear: DenseLinear | PackedLinear, start: int, weight: torch.Tensor) -> None:
    fits = weight.dim() == 2 and weight.shape[1] == linear.in_features
    if not (fits and 0 <= start and start + weight.shape[0] <= linear.out_features):
        raise ValueError(
            f"rows {tuple(weight.shape)} at {start} do not fit a weight of "
            f"({linear.out_features}, {linear.in_features})"
        )


def _check_input(linear: DenseLinear | PackedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dim() != 2 or x.shape[1] != linear.in_features or x.dtype != linear.dtype:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}; it must be [M, {linear.in_features}] {linear.dtype}"
        )
    if bias is not None and bias.shape != (linear.out_features,):
        raise ValueError(f"bias is {tuple(bias.shape)}; it must be ({linear.out_features},)")


reference = DenseLinear

IMPLEMENTATIONS = [
    Impl(PackedLinear, why_not=native.why_not),
    Impl(DenseLinear),
]
linear = Op("linear", IMPLEMENTATIONS)
