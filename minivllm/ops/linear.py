"""Linear layers over a weight that is packed once, when it is loaded, into the order the kernel reads.

Owns the packed copy (the only one) and both ways to read it: multiply, and gather rows for tied embeddings.
Knows nothing of checkpoints, sharding or layer names.

One row of x gives the same bits alone and among a thousand: K is summed in a fixed order in float32, never
split over threads, by one instruction family for every number of rows (for bfloat16 AMX where the machine has
it, or products of pairs; fused multiply-adds otherwise).
"""

from __future__ import annotations

from typing import Any

import torch

from minivllm.ops import gpu, native
from minivllm.ops.activation import reference as silu_mul
from minivllm.ops.checks import require
from minivllm.ops.kv_write import KvPlace
from minivllm.ops.op import Impl, Op, OpSpec
from minivllm.ops.rms_norm import RowNorm
from minivllm.ops.rotary import Turn, native_turn
from minivllm.ops.sampling import likeliest_reference


class DenseLinear:
    """The specification: a plain [out_features, in_features] matrix, multiplied in float32.

    `gated`: its first half of rows is a gate's, the second an up projection's, for `silu_mul`.
    """

    fuses_neighbours = False  # whether it has what `PackedLinear` has beyond this class
    _activate = staticmethod(silu_mul)

    def __init__(
        self,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        *,
        gated: bool = False,
        device: str = "cpu",
    ) -> None:
        """dtype: of x."""
        self.out_features, self.in_features, self.dtype, self.gated = out_features, in_features, dtype, gated
        self._allocate(device)

    def _allocate(self, device: str) -> None:
        """Make the weight's memory, and choose what else depends on the device."""
        self._weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes the packed weight takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the packed weight lies in."""
        return (self._weight,)

    def load_rows(self, start: int, weight: torch.Tensor) -> None:
        """Convert `weight` ([n, in_features], any float dtype) to rows start..start+n of the matrix."""
        check_rows(self, start, weight)
        self._weight[start : start + weight.shape[0]] = weight

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The weight's rows `ids` ([T] int64) as [T, in_features]; IndexError for a row that is not there."""
        return torch.nn.functional.embedding(ids, self._weight)

    def __call__(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        *,
        addend: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x @ weight.T + addend + bias, summed in float32 and rounded once to `out_dtype` (default: x's).

        x: [M, in_features] in the weight's dtype, any row stride; bias: [out_features]; addend: [M,
        out_features] float32; out: [M, out_features] to write to, rows contiguous. Returns [M, out_features].
        """
        y = self._sums(x, bias, addend).to(out_dtype or x.dtype)
        return y if out is None else out.copy_(y)

    def add_to(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        addend: torch.Tensor | None = None,
    ) -> None:
        """residual += self(x, bias, addend=addend), in place. residual: [M, out_features] in x's dtype."""
        residual += self(x, bias, addend=addend)

    def silu_mul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        addend: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`ops/activation.py` of self(x, bias, addend=addend), for a gated weight: [M, out_features / 2]."""
        y = self._activate(self(x, bias, addend=addend))
        return y if out is None else out.copy_(y)

    def likeliest(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`likeliest_reference` of self(x, out_dtype=torch.float32): tokens [M] int64, broken rows [M] uint8."""
        return likeliest_reference(self(x, out_dtype=torch.float32))

    def _sums(
        self, x: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor | None
    ) -> torch.Tensor:
        check_input(self, x, bias, addend)
        y = x.float() @ self._weight.float().t()
        if addend is not None:
            y += addend
        if bias is not None:
            y += bias.float()
        return y


class PackedLinear:
    """`DenseLinear` in C++, its weight packed for the instruction set in use when it is made.

    A gated weight has the rows of gate and up interleaved, so that `silu_mul` is part of the multiplication; it
    has no other use. A norm of x may be part of it too: the bits are those of `ops/rms_norm.py` before it.
    """

    fuses_neighbours = True

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, *, gated: bool = False) -> None:
        self.out_features, self.in_features, self.dtype, self.gated = out_features, in_features, dtype, gated
        self._format = self._make_format(native.DTYPE_CODES[dtype], out_features, in_features, gated)
        self._packed = native.huge_pages(self._format.nbytes)  # touched by load_rows, not here

    def _make_format(self, *sizes: int) -> Any:
        return native.lib.LinearFormat(*sizes)

    @property
    def nbytes(self) -> int:
        """Bytes the packed weight takes: the matrix's, padded to whole panels."""
        return self._format.nbytes

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the packed weight lies in."""
        return (self._packed,)

    def load_rows(self, start: int, weight: torch.Tensor) -> None:
        """Convert `weight` ([n, in_features], any float dtype) and pack it in place as rows start..start+n.

        It is read as it is packed: float32, bfloat16 and float16 are never copied first.
        """
        check_rows(self, start, weight)
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
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        *,
        addend: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        norm: RowNorm | None = None,
    ) -> torch.Tensor:
        """x @ weight.T + addend + bias, summed in float32 and rounded once to `out_dtype` (default: x's).

        x: [M, in_features] in the weight's dtype, any row stride; bias: [out_features]; addend: [M,
        out_features] float32; out: [M, out_features] to write to, rows contiguous; norm: of x, before it is
        multiplied. Returns [M, out_features].
        """
        assert not self.gated, "a gated weight is packed for silu_mul"
        if out is None:
            out = torch.empty(x.shape[0], self.out_features, dtype=out_dtype or x.dtype)
        return self._multiply(_STORE, out, self.out_features, x, bias, addend, norm)

    def add_to(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        addend: torch.Tensor | None = None,
    ) -> None:
        """residual += self(x, bias, addend=addend), in place. residual: [M, out_features] in x's dtype."""
        assert not self.gated, "a gated weight is packed for silu_mul"
        if residual.dtype != x.dtype:
            raise ValueError(f"residual is {residual.dtype}; it must be {x.dtype}")
        self._multiply(_ADD_RESIDUAL, residual, self.out_features, x, bias, addend)

    def silu_mul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        addend: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        norm: RowNorm | None = None,
    ) -> torch.Tensor:
        """`ops/activation.py` of self(x, bias, addend=addend, norm=norm), for a gated weight: [M, out_features / 2]."""
        assert self.gated, "silu_mul needs a weight that is packed for it"
        if out is None:
            out = torch.empty(x.shape[0], self.out_features // 2, dtype=x.dtype)
        return self._multiply(_SILU_MUL, out, self.out_features // 2, x, bias, addend, norm)

    def add_gated(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        down: PackedLinear,
        bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        *,
        norm: RowNorm | None = None,
    ) -> None:
        """`down.add_to(residual, self.silu_mul(x, bias, norm=norm), down_bias)`, a part of the rows after the other.

        residual: [M, down.out_features] in x's dtype, rows contiguous; it may be x itself.
        """
        if down.in_features * down.dtype.itemsize > _FITTING_BYTES:
            return down.add_to(residual, self.silu_mul(x, bias, norm=norm), down_bias)
        assert self.gated and not down.gated, "a gated weight, then one that is not"
        check_input(self, x, bias, None)
        if down.in_features != self.out_features // 2 or down.dtype != self.dtype:
            raise ValueError(
                f"down takes {down.in_features} of {down.dtype}; it is given {self.out_features // 2} of {self.dtype}"
            )
        require("residual", residual, x.dtype, (x.shape[0], down.out_features), dense=1)
        if x.stride(1) != 1:
            x = x.contiguous()
        bias, *bias_arguments = _vector("bias", bias, self.out_features)
        down_bias, *down_bias_arguments = _vector("down's bias", down_bias, down.out_features)
        self._format.multiply_gated(
            residual.data_ptr(), residual.stride(0), x.data_ptr(), x.stride(0), x.shape[0],
            self._packed.data_ptr(), *bias_arguments, down._format, down._packed.data_ptr(), *down_bias_arguments,
            *_norm_arguments(norm, x),
        )  # fmt: skip

    def turn_and_write(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        turn: Turn,
        place: KvPlace,
        *,
        addend: torch.Tensor | None = None,
        norm: RowNorm | None = None,
    ) -> torch.Tensor:
        """`ops/rotary_kv_write.py` of self(x, bias, addend=addend, norm=norm), to the bit, where that is the heads of
        queries, of keys and of values: they are turned and written as they come, and not kept.

        Returns the turned queries, [M, num_heads, head_dim]. Where there is a `place.kept`, a step that is left to
        attention has its turned keys, and its values, there and not in the cache.

        Raises:
            IndexError: a position or a slot is outside its table; nothing has been changed then.
            ValueError: a tensor is not laid out as it should be.
        """
        assert not self.gated, "a gated weight is packed for silu_mul"
        check_input(self, x, bias, addend)
        layout, num_rows, num_blocks = place.layout, x.shape[0], len(place.kv_cache)
        head_dim, (max_position, rot_dim) = layout.head_dim, turn.cos_sin.shape
        num_heads = self.out_features // head_dim - 2 * layout.num_kv_heads
        if num_heads < 1 or self.out_features % head_dim or rot_dim > head_dim:
            raise ValueError(
                f"{self.out_features} outputs are no heads of {head_dim}, keys and values of "
                f"{layout.num_kv_heads} of them, {rot_dim} dimensions of each turned"
            )
        q_norm, k_norm, eps = native_turn(turn, x.dtype, head_dim)
        if turn.positions.shape != (num_rows,):
            raise ValueError(f"{num_rows} rows have positions of shape {tuple(turn.positions.shape)}")
        require("kv_cache", place.kv_cache, torch.uint8, layout.shape(num_blocks))
        require("slot_mapping", place.slot_mapping, torch.int64, (num_rows,))
        if place.kept is not None:
            require("kept", place.kept, x.dtype, (num_rows, 2 * layout.num_kv_heads, head_dim))
        if x.stride(1) != 1:
            x = x.contiguous()
        bias, bias_address, bias_code = _vector("bias", bias, self.out_features)
        addend_address, addend_stride = (0, 0) if addend is None else (addend.data_ptr(), addend.stride(0))
        norm_address, *norm_arguments = _norm_arguments(norm, x)
        q = torch.empty(num_rows, num_heads, head_dim, dtype=x.dtype)
        self._format.turn_and_write(
            (num_rows, x.stride(0), addend_stride),
            (num_heads, layout.num_kv_heads, head_dim, num_blocks, layout.block_size, max_position, rot_dim),
            (q.data_ptr(), x.data_ptr(), self._packed.data_ptr(), bias_address, addend_address, norm_address),
            (turn.positions.data_ptr(), turn.cos_sin.data_ptr(), q_norm, k_norm),
            (place.kv_cache.data_ptr(), place.slot_mapping.data_ptr(),
             0 if place.kept is None else place.kept.data_ptr()),
            bias_code, *norm_arguments, layout.code, eps, place.k_scale, place.v_scale,
        )  # fmt: skip
        return q

    def likeliest(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`likeliest_reference` of self(x, out_dtype=torch.float32), which is not kept: tokens [M] int64, broken rows
        [M] uint8. The token of a broken row means nothing."""
        assert not self.gated, "a gated weight is packed for silu_mul"
        check_input(self, x, None, None)
        if x.stride(1) != 1:
            x = x.contiguous()
        tokens, broken = torch.empty(x.shape[0], dtype=torch.int64), torch.empty(x.shape[0], dtype=torch.uint8)
        self._format.likeliest(
            tokens.data_ptr(), broken.data_ptr(), x.data_ptr(), x.stride(0), x.shape[0], self._packed.data_ptr()
        )
        return tokens, broken

    def _multiply(
        self,
        epilogue: int,
        out: torch.Tensor,
        width: int,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        addend: torch.Tensor | None,
        norm: RowNorm | None = None,
    ) -> torch.Tensor:
        check_input(self, x, bias, addend)
        if out.shape != (x.shape[0], width) or (width > 1 and out.stride(1) != 1):
            raise ValueError(
                f"the output is {tuple(out.shape)} of strides {out.stride()}; it must be "
                f"({x.shape[0]}, {width}) with contiguous rows"
            )
        if x.stride(1) != 1:
            x = x.contiguous()
        bias, *bias_arguments = _vector("bias", bias, self.out_features)
        addend_address, addend_stride = 0, 0
        if addend is not None:
            addend_address, addend_stride = addend.data_ptr(), addend.stride(0)
        self._format.multiply(
            out.data_ptr(), native.dtype_code(out), out.stride(0), epilogue, x.data_ptr(), x.stride(0), x.shape[0],
            self._packed.data_ptr(), *bias_arguments, addend_address, addend_stride, *_norm_arguments(norm, x),
        )  # fmt: skip
        return out


_STORE, _ADD_RESIDUAL, _SILU_MUL = 0, 1, 2  # as in csrc/cpu/linear.h

# Of a row between the two products of a gated MLP: 256 of them (csrc/cpu/linear_parts.h) stay in a core's L2 of 2 MiB.
_FITTING_BYTES = 7168


def _vector(name: str, vector: torch.Tensor | None, size: int) -> tuple[torch.Tensor | None, int, int]:
    """A bias that the kernel can read, to be kept meanwhile, its address and dtype's code; zeros for none."""
    if vector is None:
        return None, 0, 0
    if vector.shape != (size,):
        raise ValueError(f"{name} is {tuple(vector.shape)}; it must be ({size},)")
    vector = vector.contiguous()
    return vector, vector.data_ptr(), native.dtype_code(vector)


def _norm_arguments(norm: RowNorm | None, x: torch.Tensor) -> tuple[int, int, float]:
    """`norm.arguments`; zeros for none."""
    return (0, 0, 0.0) if norm is None else norm.arguments(x)


def check_rows(linear: DenseLinear | PackedLinear, start: int, weight: torch.Tensor) -> None:
    fits = weight.dim() == 2 and weight.shape[1] == linear.in_features
    if not (fits and 0 <= start and start + weight.shape[0] <= linear.out_features):
        raise ValueError(
            f"rows {tuple(weight.shape)} at {start} do not fit a weight of "
            f"({linear.out_features}, {linear.in_features})"
        )


def check_input(
    linear: DenseLinear | PackedLinear,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
) -> None:
    if x.dim() != 2 or x.shape[1] != linear.in_features or x.dtype != linear.dtype:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}; it must be [M, {linear.in_features}] {linear.dtype}"
        )
    if bias is not None and bias.shape != (linear.out_features,):
        raise ValueError(f"bias is {tuple(bias.shape)}; it must be ({linear.out_features},)")
    if addend is not None:
        require("addend", addend, torch.float32, (x.shape[0], linear.out_features), dense=1)


reference = DenseLinear


def cuda_why_not(spec: OpSpec) -> str | None:
    return None if spec.device == "cuda" else f"needs CUDA, got {spec.device}"


IMPLEMENTATIONS = [
    Impl(PackedLinear, why_not=native.why_not),
    Impl("linear_cuda:CublasLinear", why_not=cuda_why_not),
    Impl(DenseLinear),
]
linear = Op("linear", IMPLEMENTATIONS)

# The same for --batch-invariant: cuBLAS chooses its kernel, and so the order of sums, by the number of rows.
INVARIANT_IMPLEMENTATIONS = [
    Impl(PackedLinear, why_not=native.why_not),
    Impl("triton.linear:TritonLinear", why_not=gpu.why_not),
]
invariant_linear = Op("invariant_linear", INVARIANT_IMPLEMENTATIONS)
