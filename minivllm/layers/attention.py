"""A layer's place in the paged attention: its own cache, scale and window over the shared backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from minivllm.attention.backend import AttentionBackend, ForwardContext, Norm, Projection
from minivllm.exceptions import ModelFilesError
from minivllm.layers.weight import Weight
from minivllm.ops.checks import require
from minivllm.ops.paged_attention import Options
from minivllm.ops.rotary import Turn

_LEAST_SCALE = 1e-9  # of an fp8 cache; the greatest is its reciprocal


class Attention:
    def __init__(
        self,
        layer_index: int,
        backend: AttentionBackend,
        *,
        sliding_window: int | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> None:
        """scale: of the scores; None is 1 / sqrt(head_dim). softcap, sinks and alibi_slopes: as in `Options`.

        The two tensors are the layer's own and read at each call: a checkpoint's sinks may be filled in later.
        """
        self.layer_index = layer_index
        self.sliding_window = sliding_window
        self._backend = backend
        scale = backend.spec.head_dim**-0.5 if scale is None else scale
        for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
            if per_head is not None:
                require(name, per_head, torch.float32, (backend.spec.num_heads,))
        self.options = Options(
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: ForwardContext, turn: Turn | None = None
    ) -> torch.Tensor:
        """q: [T, num_heads, head_dim]; k, v: [T, num_kv_heads, head_dim] -> [T, num_heads * head_dim].

        turn: to be done to q and k first, in place.
        """
        where = ctx.kv_caches[self.layer_index], ctx.metadata[self.layer_index]
        if turn is None:
            out = self._backend.forward(q, k, v, *where, options=self.options)
        else:
            out = self._backend.turn_and_forward(turn, q, k, v, *where, options=self.options)
        return out.view(q.shape[0], -1)

    def of_projection(
        self, project: Projection, x: torch.Tensor, norm: Norm | None, ctx: ForwardContext, turn: Turn
    ) -> torch.Tensor:
        """self(*project(x, norm), ctx, turn), with as much of it as can be in one pass."""
        where = ctx.kv_caches[self.layer_index], ctx.metadata[self.layer_index]
        out = self._backend.project_and_forward(project, x, norm, turn, *where, options=self.options)
        return out.view(x.shape[0], -1)

    def scales(self) -> Iterator[Weight]:
        """What an fp8 cache counts in, if the checkpoint says; of no use to other types."""
        for name in ("k_scale", "v_scale"):
            yield Weight(name, (), lambda start, value, name=name: self._set_scale(name, value.item()))

    def _set_scale(self, name: str, value: float) -> None:
        if not _LEAST_SCALE <= value <= 1 / _LEAST_SCALE:  # kernels tell positions that are not seen by their scores
            bounds = f"from {_LEAST_SCALE:g} to {1 / _LEAST_SCALE:g}"
            raise ModelFilesError(f"{name} of layer {self.layer_index} is {value:g}; it must be a number {bounds}")
        if self._backend.has_scales:
            self.options = replace(self.options, **{name: value})
