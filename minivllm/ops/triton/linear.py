"""Matrix multiplication with its epilogue (bias, addend, residual, gate): one tile shape whatever the number of rows.

A program takes one tile of the result after another and goes through all of K in ascending order: nothing is split
along K, and the tile's shape follows from the weight's, never from the batch's, so a row's bits do not depend on its
neighbours. cuBLAS, which chooses by the number of rows, is faster; this is for `--batch-invariant`.

int8 sums are exact whatever the tile. float8 sums are added to float32 every tile of K: the tensor cores of Hopper keep
14 bits of a longer one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minivllm.ops.linear import DenseLinear, check_input
from minivllm.ops.linear_fp8 import DenseFp8Linear
from minivllm.ops.linear_int8 import LEAST_AMAX, DenseInt8Linear
from minivllm.ops.triton.numerics import round_half_even

_FP8_MAX = tl.constexpr(448.0)
_STORE, _ADD_RESIDUAL, _SILU_MUL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def choose_tile(out_features: int, dtype: torch.dtype) -> Tile:
    """By the weight alone. Narrow weights get narrow tiles, so that a decode step has one for most multiprocessors.

    Unmeasured (docs/gpu.md).
    """
    if dtype == torch.float32:
        return Tile(32, 32, 32, 4, 3)
    depth = 128 if dtype.itemsize == 1 else 64
    if out_features >= 16384:
        return Tile(64, 128, depth, 4, 4)
    return Tile(64, 64 if out_features >= 8192 else 32, depth, 4, 4)


@triton.jit
def _add_product(acc, a, b, DEPTH: tl.constexpr, IS_INT8: tl.constexpr, IS_FP8: tl.constexpr):
    """acc + a @ b."""
    if IS_INT8:
        return acc + tl.dot(a, b, out_dtype=tl.int32)
    else:
        return tl.dot(a, b, acc, input_precision="ieee", max_num_imprecise_acc=DEPTH if IS_FP8 else None)


@triton.jit
def _products(
    x_rows, weight_rows, up_offset, is_row, is_column, in_features, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, EPILOGUE: tl.constexpr, IS_INT8: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    """A tile's sums over all of K, ascending; a second one for the up projection's rows, zero where there are none."""
    sum_dtype: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    acc = tl.zeros([ROWS, COLUMNS], sum_dtype)
    up = tl.zeros([ROWS, COLUMNS], sum_dtype)
    for start in range(0, in_features, DEPTH):
        k = start + tl.arange(0, DEPTH)
        is_k = k < in_features
        weight_mask = is_column[None, :] & is_k[:, None]
        a = tl.load(x_rows + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
        b = tl.load(weight_rows + k[:, None], mask=weight_mask, other=0.0, eviction_policy="evict_first")
        acc = _add_product(acc, a, b, DEPTH, IS_INT8, IS_FP8)
        if EPILOGUE == _SILU_MUL:
            places = weight_rows + up_offset + k[:, None]
            c = tl.load(places, mask=weight_mask, other=0.0, eviction_policy="evict_first")
            up = _add_product(up, a, c, DEPTH, IS_INT8, IS_FP8)
    return acc, up


@triton.jit(do_not_specialize=["num_rows"])  # one code, and no compiler, for any number of rows
def _gemm_kernel(
    out, x, weight, bias, addend, x_scales, weight_scales,
    num_rows, out_features, in_features, up_offset, out_stride, x_stride, weight_stride, addend_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EPILOGUE: tl.constexpr,
    IS_INT8: tl.constexpr, IS_FP8: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """out[num_rows, out_features] of x [num_rows, K] and weight [≥ out_features, K]. Grid: as many programs as fit.

    EPILOGUE _SILU_MUL: gate's rows are the first out_features of the weight, up's begin at up_offset. ROUNDED: the
    dtype that gate and up are rounded to before the activation.
    """
    row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(out_features, COLUMNS)
    # Neighbours share columns, so that a weight's tile is read from memory once for all rows.
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        rows = tile % row_tiles * ROWS + tl.arange(0, ROWS)
        columns = tile // row_tiles * COLUMNS + tl.arange(0, COLUMNS)
        is_row, is_column = rows < num_rows, columns < out_features
        x_rows = x + rows.to(tl.int64)[:, None] * x_stride
        weight_rows = weight + columns.to(tl.int64)[None, :] * weight_stride
        acc, up = _products(
            x_rows, weight_rows, up_offset, is_row, is_column, in_features, ROWS, COLUMNS, DEPTH, EPILOGUE,
            IS_INT8, IS_FP8,
        )  # fmt: skip

        places = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
        is_element = is_row[:, None] & is_column[None, :]
        addend_places = addend
        if addend is not None:
            addend_places = addend + rows.to(tl.int64)[:, None] * addend_stride + columns[None, :]
        y = _dressed(
            acc, 0, rows, columns, is_row, is_column, is_element, bias, addend, addend_places, x_scales, weight_scales,
            IS_INT8 or IS_FP8,
        )  # fmt: skip
        if EPILOGUE == _SILU_MUL:
            u = _dressed(
                up, up_offset // weight_stride, rows, columns, is_row, is_column, is_element, bias, addend,
                addend_places, x_scales, weight_scales, IS_INT8 or IS_FP8,
            )  # fmt: skip
            gate = y.to(ROUNDED).to(tl.float32)
            active = (gate / (1.0 + tl.exp(-gate))).to(ROUNDED).to(tl.float32)
            y = active * u.to(ROUNDED).to(tl.float32)
        if EPILOGUE == _ADD_RESIDUAL:
            # Rounded by itself first, as the reference does.
            y = y.to(ROUNDED).to(tl.float32) + tl.load(places, mask=is_element, other=0.0).to(tl.float32)
        tl.store(places, y.to(out.dtype.element_ty), mask=is_element)


@triton.jit
def _dressed(
    sums, first_column, rows, columns, is_row, is_column, is_element, bias, addend, addend_places, x_scales,
    weight_scales, IS_SCALED: tl.constexpr,
):  # fmt: skip
    """Sums, scaled, with addend and bias, in float32."""
    y = sums.to(tl.float32)
    if IS_SCALED:
        row_scales = tl.load(x_scales + rows, mask=is_row, other=0.0)
        column_scales = tl.load(weight_scales + first_column + columns, mask=is_column, other=0.0)
        y = y * (row_scales[:, None] * column_scales[None, :])
    if addend is not None:
        y += tl.load(addend_places + first_column, mask=is_element, other=0.0)
    if bias is not None:
        y += tl.load(bias + first_column + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _quantise_kernel(q, scales, x, in_features, x_stride, least, IS_INT8: tl.constexpr, BLOCK: tl.constexpr):
    """A scale for each row: the largest magnitude is the type's. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    limit: tl.constexpr = 127.0 if IS_INT8 else _FP8_MAX
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros([1], tl.float32)
    broken = tl.zeros([1], tl.int32)
    for start in range(0, in_features, BLOCK):
        is_column = start + columns < in_features
        numbers = tl.load(x + row * x_stride + start + columns, mask=is_column, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(numbers), 0))
        broken = tl.maximum(broken, tl.max(tl.where(numbers - numbers == 0.0, 0, 1), 0))
    is_usable = (broken == 0) & (largest >= least)
    reciprocal = tl.div_rn(tl.full([1], limit, tl.float32), tl.where(is_usable, largest, limit))
    scale = tl.where(is_usable, tl.div_rn(largest, tl.full([1], limit, tl.float32)), 0.0)
    tl.store(scales + row + tl.arange(0, 1), tl.where(broken > 0, float("nan"), scale))
    for start in range(0, in_features, BLOCK):
        is_column = start + columns < in_features
        numbers = tl.load(x + row * x_stride + start + columns, mask=is_column, other=0.0).to(tl.float32)
        codes = tl.where(is_usable, numbers, 0.0) * reciprocal
        if IS_INT8:
            codes = round_half_even(codes)
        tl.store(q + row * in_features + start + columns, codes.to(q.dtype.element_ty), mask=is_column)


def quantise_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] -> codes [M, K] of int8 or float8_e4m3fn, scales [M] float32, by the rules of `ops/linear_int8.py`."""
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if q.numel():
        _quantise_kernel[(len(x),)](
            q,
            scales,
            x,
            x.shape[1],
            x.stride(0),
            LEAST_AMAX,
            IS_INT8=dtype == torch.int8,
            BLOCK=2048,
            num_warps=4,
            enable_fp_fusion=False,  # a product is rounded before it is rounded to a whole number
        )
    return q, scales


def _gemm(
    epilogue: tl.constexpr,
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    x_scales: torch.Tensor | None = None,
    weight_scales: torch.Tensor | None = None,
    rounded: torch.dtype | None = None,
) -> torch.Tensor:
    """out: [M, N]; x: [M, K]; weight: [N, K], or [2N, K] for a gate and an up projection."""
    (num_rows, out_features), in_features = out.shape, x.shape[1]
    if not out.numel():
        return out
    tile = choose_tile(out_features, weight.dtype)
    num_tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(out_features, tile.columns)
    _gemm_kernel[(min(num_tiles, _num_programs(x.device)),)](
        out, x, weight, bias, addend, x_scales, weight_scales,
        num_rows, out_features, in_features, out_features * weight.stride(0), out.stride(0), x.stride(0),
        weight.stride(0), addend.stride(0) if addend is not None else 0,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, EPILOGUE=epilogue,
        IS_INT8=weight.dtype == torch.int8, IS_FP8=weight.dtype == torch.float8_e4m3fn,
        ROUNDED=_TRITON_DTYPES[rounded or out.dtype], num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _num_programs(device: torch.device) -> int:
    """Two for each multiprocessor: while one waits for memory, the other multiplies."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class _Multiplies:
    """The calls of `DenseLinear` by one kernel. Has `_operands(x)`: x as it is multiplied, the weight, their scales."""

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
        if out is None:
            out = torch.empty(len(x), self.out_features, dtype=out_dtype or x.dtype, device=x.device)
        x_operand, weight, x_scales, weight_scales = self._operands(x)
        return _gemm(_STORE, out, x_operand, weight, bias, addend, x_scales, weight_scales)

    def add_to(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        addend: torch.Tensor | None = None,
    ) -> None:
        check_input(self, x, bias, addend)
        x_operand, weight, x_scales, weight_scales = self._operands(x)
        _gemm(_ADD_RESIDUAL, residual, x_operand, weight, bias, addend, x_scales, weight_scales)

    def silu_mul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        addend: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_input(self, x, bias, addend)
        if out is None:
            out = torch.empty(len(x), self.out_features // 2, dtype=x.dtype, device=x.device)
        x_operand, weight, x_scales, weight_scales = self._operands(x)
        return _gemm(_SILU_MUL, out, x_operand, weight, bias, addend, x_scales, weight_scales, x.dtype)


class TritonLinear(_Multiplies, DenseLinear):
    """`DenseLinear`, batch invariant."""

    def _operands(self, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (x if x.stride(1) == 1 else x.contiguous()), self._weight, None, None


class _QuantisesRows(_Multiplies):
    """x as codes of the weight's type."""

    def _operands(self, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, scales = quantise_rows(x if x.stride(1) == 1 else x.contiguous(), self._weight.dtype)
        return q, self._weight, scales, self._scales


class TritonInt8Linear(_QuantisesRows, DenseInt8Linear):
    """`DenseInt8Linear`."""


class TritonFp8Linear(_QuantisesRows, DenseFp8Linear):
    """`DenseFp8Linear`."""
