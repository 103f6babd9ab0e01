"""Linear layers: several projections of one input in one packed matrix. Owns how checkpoint tensors map onto it.

What follows a projection at once (the residual addition, a gate's SiLU) is part of it where the kernel can do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from minivllm.layers.activation import gated_activation
from minivllm.layers.norm import RMSNorm
from minivllm.layers.weight import Weight, weight_of
from minivllm.ops.kv_write import KvPlace
from minivllm.ops.linear import DenseLinear, invariant_linear, linear
from minivllm.ops.linear_fp8 import fp8_linear, invariant_fp8_linear
from minivllm.ops.linear_int4 import int4_linear
from minivllm.ops.linear_int8 import int8_linear, invariant_int8_linear
from minivllm.ops.op import Op, OpSpec
from minivllm.ops.rotary import Turn

_FUSED_ACTIVATIONS = ("silu", "swish")
_FORMATS: dict[str | None, Op] = {
    None: linear,
    "int8": int8_linear,
    "int4": int4_linear,
    "fp8": fp8_linear,
    "batch_invariant": invariant_linear,
    "invariant_int8": invariant_int8_linear,
    "invariant_fp8": invariant_fp8_linear,
}
# In the place of a quantization: the same, and a row's bits whatever the number of rows. int4 is so anyway.
_BATCH_INVARIANT: dict[str | None, str] = {None: "batch_invariant", "int8": "invariant_int8", "fp8": "invariant_fp8"}


def batch_invariant(quantization: str | None) -> str | None:
    """What to name in the place of a quantization for rows whose bits depend on no others."""
    return _BATCH_INVARIANT.get(quantization, quantization)


def linear_class(
    out_features: int, in_features: int, *, dtype: torch.dtype, device: str, quantization: str | None
) -> Callable[..., DenseLinear]:
    """What makes a weight of this size and format, `DenseLinear` being its contract."""
    sizes = {"in_features": in_features, "out_features": out_features}
    chosen = _FORMATS[quantization].select(OpSpec(device, dtype, sizes))
    return chosen if device == "cpu" else partial(chosen, device=device)


class MergedLinear:
    """Projections of the same input, computed as one: their outputs lie side by side, in the order given."""

    def __init__(
        self,
        in_features: int,
        out_features: dict[str, int],
        *,
        bias: bool = False,
        gated: bool = False,
        dtype: torch.dtype,
        device: str,
        quantization: str | None = None,
    ) -> None:
        """out_features: projection name in the checkpoint -> rows of its weight; gated: as in `ops/linear.py`."""
        self.in_features, self.out_features = in_features, out_features
        num_rows = sum(out_features.values())
        packed = linear_class(num_rows, in_features, dtype=dtype, device=device, quantization=quantization)
        self.packed = packed(num_rows, in_features, dtype, gated=gated)
        self.bias = torch.empty(num_rows, dtype=dtype, device=device) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in_features] -> [T, sum(out_features)]."""
        return self.packed(x, self.bias)

    def weights(self) -> Iterator[Weight]:
        begin = 0
        for name, num_rows in self.out_features.items():
            yield self._matrix(name, begin, num_rows)
            if self.bias is not None:
                yield weight_of(f"{name}.bias", self.bias[begin : begin + num_rows])
            begin += num_rows

    def _matrix(self, name: str, begin: int, num_rows: int) -> Weight:
        def load_rows(start: int, rows: torch.Tensor) -> None:
            self.packed.load_rows(begin + start, rows)

        num_bytes = self.packed.nbytes * num_rows // self.packed.out_features
        return Weight(f"{name}.weight", (num_rows, self.in_features), load_rows, num_bytes, self.packed.tensors)


class QKVLinear(MergedLinear):
    """Query, key and value projections."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: str,
        quantization: str | None = None,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        projections = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        super().__init__(
            hidden_size, projections, bias=bias, dtype=dtype, device=device, quantization=quantization
        )

    def __call__(
        self, x: torch.Tensor, norm: RMSNorm | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of norm(x), if there is a norm. x: [T, hidden_size] -> q [T, num_heads, head_dim], k and v
        [T, num_kv_heads, head_dim]; views of one."""
        out = super().__call__(x if norm is None else norm(x))
        heads = out.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return q, k, v

    @property
    def turns_heads(self) -> bool:
        """Whether `turn_and_write` is there: norms, rotation and cache write as parts of the product."""
        return self.packed.fuses_neighbours

    def turn_and_write(self, x: torch.Tensor, norm: RMSNorm | None, turn: Turn, place: KvPlace) -> torch.Tensor:
        """The turned queries, [T, num_heads, head_dim]; keys and values are in their place and nowhere else, or, of
        a step that is left to attention, in `place.kept` and not in the cache yet."""
        of_rows = None if norm is None else norm.of_rows
        return self.packed.turn_and_write(x, self.bias, turn, place, norm=of_rows)


class RowLinear(MergedLinear):
    """One projection, back into the residual stream. (Named for how it is cut when several workers share it.)"""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        name: str,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: str,
        quantization: str | None = None,
    ) -> None:
        super().__init__(
            in_features,
            {name: out_features},
            bias=bias,
            dtype=dtype,
            device=device,
            quantization=quantization,
        )

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += self(x), in place. residual: [T, out_features]; x: [T, in_features]."""
        self.packed.add_to(residual, x, self.bias)


class GatedLinear(MergedLinear):
    """Gate and up projections with the activation between them."""

    def __init__(
        self,
        in_features: int,
        inner: int,
        activation: str,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: str,
        quantization: str | None = None,
    ) -> None:
        """activation: by the name config.json gives it; `HFConfig` has checked it."""
        self._is_fused = activation in _FUSED_ACTIVATIONS
        self._activation = gated_activation(activation, dtype=dtype, device=device)
        projections = {"gate_proj": inner, "up_proj": inner}
        super().__init__(
            in_features,
            projections,
            bias=bias,
            gated=self._is_fused,
            dtype=dtype,
            device=device,
            quantization=quantization,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in_features] -> [T, inner]."""
        if self._is_fused:
            return self.packed.silu_mul(x, self.bias)
        return self._activation(super().__call__(x))

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, norm: RMSNorm, down: RowLinear) -> None:
        """residual += down(self(norm(x))), in place. x: [T, in_features], which may be `residual` itself."""
        packed = self.packed
        if self._is_fused and packed.fuses_neighbours and type(down.packed) is type(packed):
            packed.add_gated(residual, x, down.packed, self.bias, down.bias, norm=norm.of_rows)
        else:
            down.add_to(residual, self(norm(x)))
