"""The contract of an attention backend: who owns the layout of the KV cache and reads and writes it.

Knows nothing of requests or of the scheduler: a step reaches it as `StepInputs`, tensors only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from minivllm.ops.kv_layout import KvLayout
from minivllm.ops.kv_write import KvPlace
from minivllm.ops.paged_attention import Options
from minivllm.ops.rms_norm import RowNorm
from minivllm.ops.rotary import Turn

# What the cache stores, as ops/kv_layout.py names it: by the model's type, or by what --kv-cache-dtype may name.
_SAME_AS_MODEL = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_KV_CACHE_DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "int8": "int8",
}


@dataclass(frozen=True)
class AttentionSpec:
    """What a backend is asked to serve; one for all layers of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: torch.dtype  # of queries, keys and values as the layers make them
    device: str
    kv_cache_dtype: str = "auto"  # what the cache stores, as the backend names it; auto: the same
    batch_invariant: bool = False  # a row's bits may not depend on the others; on a CPU they never do
    cuda_decode: bool = True  # decode by a CUDA C++ kernel where there is one that serves the rest


@dataclass(frozen=True)
class StepInputs:
    """One step's tokens and where their keys and values go; requests in batch order.

    Where they go differs from one KV cache group of layers to the next (`block_table`, `slot_mapping`). In the table of
    a window, what stands before the window is anything: it must not be read.
    """

    query_start_loc: torch.Tensor  # [num_reqs + 1] int32: request b's rows are query_start_loc[b] … [b + 1]
    seq_lens: torch.Tensor  # [num_reqs] int32: tokens a request has after this step
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32
    slot_mapping: torch.Tensor  # [num_tokens] int64: block_id * block_size + offset
    max_query_len: int | None = None  # bounds that the host knows, so that nobody need ask the device
    max_seq_len: int | None = None
    room: Any = None  # the backend's `new_room`: what it finds out of a step lies there, in the same place each time


@dataclass(frozen=True)
class ForwardContext:
    """What a step's layers share beyond their input: an argument of `forward`, never a global."""

    metadata: list[Any]  # as the backend's build_metadata made it; one a layer, the same for all of a KV cache group
    kv_caches: list[torch.Tensor]  # one a layer
    # [W] int64: rows of the step whose hidden states are asked for, the only ones that the model gives; None: all.
    wanted: torch.Tensor | None = None


class Norm(Protocol):
    """What a layer's input passes on its way to a projection: `layers.norm.RMSNorm`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    @property
    def of_rows(self) -> RowNorm: ...


class Projection(Protocol):
    """What makes queries, keys and values of a layer's input: `layers.linear.QKVLinear`."""

    @property
    def turns_heads(self) -> bool: ...

    def __call__(
        self, x: torch.Tensor, norm: Norm | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def turn_and_write(self, x: torch.Tensor, norm: Norm | None, turn: Turn, place: KvPlace) -> torch.Tensor: ...


def why_not_any(spec: AttentionSpec) -> str | None:
    """None, or the reason no backend serves the spec."""
    if spec.num_heads % spec.num_kv_heads:
        return f"{spec.num_heads} heads cannot share {spec.num_kv_heads} KV heads evenly"
    if spec.kv_cache_dtype != "auto" and spec.kv_cache_dtype not in _KV_CACHE_DTYPES:
        return f"no KV cache in {spec.kv_cache_dtype}, only in auto, {', '.join(_KV_CACHE_DTYPES)}"
    return None


class AttentionBackend(ABC):
    """One way to do attention over the paged cache, bound to a spec."""

    name: str
    layout_class: type[KvLayout]

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        kv_dtype = _KV_CACHE_DTYPES.get(spec.kv_cache_dtype, _SAME_AS_MODEL[spec.dtype])
        self.layout = self.layout_class(kv_dtype, spec.num_kv_heads, spec.head_dim, spec.block_size)

    @classmethod
    @abstractmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        """None, or the reason this backend cannot serve the spec."""

    @property
    def layout_id(self) -> str:
        """Of a block's bytes; blocks move only between equal ids."""
        return self.layout.layout_id

    @property
    def numerics_id(self) -> str:
        """Of the bits of an answer, as far as the backend has a choice: equal ids, equal bits on one device."""
        return self.layout_id

    @property
    def has_scales(self) -> bool:
        """Whether the cache's type counts in a k_scale and a v_scale of the layer's, which a checkpoint may hold."""
        return self.layout.dtype == "fp8_e4m3"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer, keys and values together."""
        return self.layout.block_bytes

    @abstractmethod
    def new_kv_cache(self, num_blocks: int) -> torch.Tensor:
        """One layer's cache: its first dimension is the block, and a block's bytes are contiguous.

        Memory that is not written yet is not taken yet.
        """

    def scratch_bytes(self, num_reqs: int, max_seq_len: int) -> int:
        """What a decode of so many requests of such a length takes beside the cache, on a device of its own."""
        return 0

    @abstractmethod
    def build_metadata(self, step: StepInputs) -> Any:
        """Whatever `forward` wants to know of the step, made once for all layers of a KV cache group."""

    def new_room(self, num_reqs: int) -> Any:
        """Where to put what `build_metadata` finds out of up to so many requests; None: it finds out nothing."""
        return None

    def sizes_of(self, metadata: Any) -> tuple[int, ...]:
        """How much metadata says beside the step's tokens and requests: what a recorded step is replayed with."""
        return ()

    def most_sizes(self, num_reqs: int) -> tuple[int, ...]:
        """The same, at most, of so many requests."""
        return ()

    def metadata_of_sizes(self, step: StepInputs, sizes: tuple[int, ...]) -> Any:
        """Metadata that has these sizes, of a step that is only recorded: what it says is anything."""
        return self.build_metadata(step)

    # Ops of `kv_write` and of `rotary_kv_write`, chosen when a backend is made.
    _write: Callable[..., None]
    _turn_and_write: Callable[..., None]

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        *,
        options: Options,
    ) -> torch.Tensor:
        """Write k and v to the cache, then attend.

        q: [T, num_heads, head_dim]; k, v: [T, num_kv_heads, head_dim]; all may be strided views. metadata has the step
        as `step`. Returns [T, num_heads, head_dim], which the next call may overwrite.
        """
        self._write(
            k, v, kv_cache, metadata.step.slot_mapping,
            layout=self.layout, k_scale=options.k_scale, v_scale=options.v_scale,
        )  # fmt: skip
        return self._attend(q, kv_cache, metadata, options)

    def turn_and_forward(
        self,
        turn: Turn,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        *,
        options: Options,
    ) -> torch.Tensor:
        """`forward` of q and k that are still to be turned: norms, rotation and cache write are one pass."""
        self._turn_and_write(
            turn.positions, q, k, v, turn.cos_sin, turn.norms, kv_cache, metadata.step.slot_mapping,
            layout=self.layout, k_scale=options.k_scale, v_scale=options.v_scale,
        )  # fmt: skip
        return self._attend(q, kv_cache, metadata, options)

    def project_and_forward(
        self,
        project: Projection,
        x: torch.Tensor,
        norm: Norm | None,
        turn: Turn,
        kv_cache: torch.Tensor,
        metadata: Any,
        *,
        options: Options,
    ) -> torch.Tensor:
        """`turn_and_forward` of q, k, v = project(x, norm): all before attention in one pass, if the projection can."""
        if not project.turns_heads:
            return self.turn_and_forward(turn, *project(x, norm), kv_cache, metadata, options=options)
        place = KvPlace(kv_cache, metadata.step.slot_mapping, self.layout, options.k_scale, options.v_scale)
        return self._attend(project.turn_and_write(x, norm, turn, place), kv_cache, metadata, options)

    @abstractmethod
    def _attend(self, q: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, options: Options) -> torch.Tensor:
        """Attention of what is in the cache, as `forward` gives it."""
