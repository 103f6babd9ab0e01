"""Paged attention by `ops/`: the native kernels, or the torch references where the extension is not built."""

from __future__ import annotations

import torch

from minivllm.attention.backend import AttentionBackend, AttentionSpec, StepInputs
from minivllm.config.cache import KV_TILE
from minivllm.config.hf_config import HEAD_DIM_STEP
from minivllm.ops.kv_write import kv_write
from minivllm.ops.op import OpSpec
from minivllm.ops.paged_attention import paged_attention


class CpuNativeBackend(AttentionBackend):
    name = "cpu_native"
    layout_id = "nhd-v1"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        sizes = {"head_dim": spec.head_dim, "block_size": spec.block_size}
        op_spec = OpSpec(spec.device, spec.dtype, sizes)
        self._write, self._attend = kv_write.select(op_spec), paged_attention.select(op_spec)

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        if spec.device != "cpu":
            return f"needs a CPU, got {spec.device}"
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} heads cannot share {spec.num_kv_heads} KV heads evenly"
        # Refused with the references in use as well: a model is served everywhere or nowhere.
        if spec.head_dim % HEAD_DIM_STEP:
            return f"head_dim {spec.head_dim} is not a multiple of {HEAD_DIM_STEP}"
        if spec.block_size % KV_TILE:
            return f"block size {spec.block_size} is not a multiple of {KV_TILE}"
        return None

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        return (num_blocks, 2, self.spec.num_kv_heads, self.spec.block_size, self.spec.head_dim)

    def build_metadata(self, step: StepInputs) -> StepInputs:
        return step

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: StepInputs,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        self._write(k, v, kv_cache, metadata.slot_mapping)
        return self._attend(
            q, kv_cache, metadata.block_table, metadata.seq_lens, metadata.query_start_loc,
            scale=scale, sliding_window=sliding_window,
        )  # fmt: skip
