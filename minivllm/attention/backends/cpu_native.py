"""Paged attention by `ops/`: the native kernels, or the torch references where the extension is not built."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from minivllm.attention.backend import (
    AttentionBackend,
    AttentionSpec,
    Norm,
    Projection,
    StepInputs,
    why_not_any,
)
from minivllm.config.cache import KV_TILE
from minivllm.config.hf_config import HEAD_DIM_STEP
from minivllm.ops import native
from minivllm.ops.kv_layout import KvLayout
from minivllm.ops.kv_write import KvPlace, kv_write
from minivllm.ops.op import OpSpec
from minivllm.ops.paged_attention import STEP, Options, SharedPrefixes, paged_attention
from minivllm.ops.rotary import Turn
from minivllm.ops.rotary_kv_write import rotary_kv_write


@dataclass(frozen=True)
class Metadata:
    """A step, and what its requests have in common."""

    step: StepInputs
    shared: SharedPrefixes | None


class CpuNativeBackend(AttentionBackend):
    name = "cpu_native"
    layout_class = KvLayout

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        group = spec.num_heads // spec.num_kv_heads
        sizes = {"head_dim": spec.head_dim, "block_size": spec.block_size, "group": group}
        op_spec = OpSpec(spec.device, spec.dtype, sizes)
        self._write, self._paged_attention = kv_write.select(op_spec), paged_attention.select(op_spec)
        self._turn_and_write = rotary_kv_write.select(op_spec)

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        if spec.device != "cpu":
            return f"needs a CPU, got {spec.device}"
        if reason := why_not_any(spec):
            return reason
        # Refused with the references in use as well: a model is served everywhere or nowhere.
        if spec.head_dim % HEAD_DIM_STEP:
            return f"head_dim {spec.head_dim} is not a multiple of {HEAD_DIM_STEP}"
        if spec.block_size % KV_TILE:
            return f"block size {spec.block_size} is not a multiple of {KV_TILE}"
        return None

    def new_kv_cache(self, num_blocks: int) -> torch.Tensor:
        return native.huge_pages(num_blocks * self.block_bytes).view(self.layout.shape(num_blocks))

    def build_metadata(self, step: StepInputs) -> Metadata:
        shared = shared_prefixes(step, self.spec.block_size)
        return Metadata(step, shared if shared is None or step.room is None else _put(shared, step.room))

    def new_room(self, num_reqs: int) -> SharedPrefixes:
        num_groups, num_members = self.most_sizes(num_reqs)
        sizes = (num_members, num_groups + 1, num_groups)
        return SharedPrefixes(*(torch.zeros(size, dtype=torch.int32) for size in sizes))

    def sizes_of(self, metadata: Metadata) -> tuple[int, int]:
        """Groups, and members of all of them."""
        shared = metadata.shared
        return (0, 0) if shared is None else (len(shared.lens), len(shared.members))

    def most_sizes(self, num_reqs: int) -> tuple[int, int]:
        return num_reqs // 2, num_reqs

    def metadata_of_sizes(self, step: StepInputs, sizes: tuple[int, ...]) -> Metadata:
        assert step.room is not None
        return Metadata(step, _places(step.room, *sizes))

    def project_and_forward(
        self,
        project: Projection,
        x: torch.Tensor,
        norm: Norm | None,
        turn: Turn,
        kv_cache: torch.Tensor,
        metadata: Metadata,
        *,
        options: Options,
    ) -> torch.Tensor:
        """As there; of few tokens the cache write is attention's, not the projection's."""
        if not project.turns_heads:
            return super().project_and_forward(project, x, norm, turn, kv_cache, metadata, options=options)
        kept = torch.empty(len(x), 2 * self.spec.num_kv_heads, self.spec.head_dim, dtype=x.dtype)
        place = KvPlace(
            kv_cache, metadata.step.slot_mapping, self.layout, options.k_scale, options.v_scale, kept
        )
        return self._attend(project.turn_and_write(x, norm, turn, place), kv_cache, metadata, options, place)

    def _attend(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Metadata,
        options: Options,
        write: KvPlace | None = None,
    ) -> torch.Tensor:
        step = metadata.step
        return self._paged_attention(
            q, kv_cache, step.block_table, step.seq_lens, step.query_start_loc,
            layout=self.layout, options=options, shared=metadata.shared, write=write,
        )  # fmt: skip


def _places(room: SharedPrefixes, num_groups: int, num_members: int) -> SharedPrefixes:
    """Where so many are put."""
    return SharedPrefixes(room.members[:num_members], room.group_starts[: num_groups + 1], room.lens[:num_groups])


def _put(shared: SharedPrefixes, room: SharedPrefixes) -> SharedPrefixes:
    """The same, where a recorded step reads it."""
    places = _places(room, len(shared.lens), len(shared.members))
    for place, value in zip(vars(places).values(), vars(shared).values()):
        place.numpy()[:] = value.numpy()
    return places


def shared_prefixes(step: StepInputs, block_size: int) -> SharedPrefixes | None:
    """Requests with one query row whose leading blocks are equal, as far as a whole group's are; None if no two's."""
    query_start_loc, table = step.query_start_loc.numpy(), step.block_table.numpy()
    decodes = np.flatnonzero(np.diff(query_start_loc) == 1)
    first_blocks = table[decodes, 0]
    if len(set(first_blocks.tolist())) == len(decodes):
        return None
    seq_lens = step.seq_lens.numpy()
    by_first = np.argsort(first_blocks, kind="stable")
    borders = np.flatnonzero(np.diff(first_blocks[by_first])) + 1
    groups, lens = [], []
    for members in np.split(decodes[by_first], borders):
        num_blocks = int(seq_lens[members].min()) // block_size
        blocks = table[members, :num_blocks]
        differ = np.flatnonzero((blocks != blocks[0]).any(0))
        num_shared = int(differ[0]) if len(differ) else num_blocks
        length = num_shared * block_size // STEP * STEP
        if len(members) > 1 and length:
            groups.append(members)
            lens.append(length)
    if not groups:
        return None
    starts = np.cumsum([0, *map(len, groups)], dtype=np.int32)
    members = np.concatenate(groups).astype(np.int32)
    return SharedPrefixes(
        torch.from_numpy(members), torch.from_numpy(starts), torch.tensor(lens, dtype=torch.int32)
    )
