"""Paged attention by the Triton kernels, over a cache in rows (`RowLayout`); decodes by CUDA C++ where it serves them.

Knows a batch by what the host knows of it: nothing here waits for the device. `--batch-invariant` is `AttentionSpec`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minivllm.attention.backend import AttentionBackend, AttentionSpec, StepInputs, why_not_any
from minivllm.logger import init_logger
from minivllm.ops import cuda, gpu
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.op import OpSpec
from minivllm.ops.paged_attention import Options

logger = init_logger(__name__)

_BLOCK_STEP = 16  # tokens; so that rows, and int8's scales behind them, start at multiples of 16 bytes
_MOST_HEAD_DIM = 256


@dataclass(frozen=True)
class Metadata:
    """A step, and the bounds that its launches are made for."""

    step: StepInputs
    max_query_len: int
    max_seq_len: int


class TritonBackend(AttentionBackend):
    name = "triton"
    layout_class = RowLayout

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        # Here, not above: who serves on a CPU may ask why_not without having Triton.
        from minivllm.ops.triton.kv_write import kv_write
        from minivllm.ops.triton.paged_attention import BatchShape, paged_attention, scratch_shape
        from minivllm.ops.triton.rotary import rotary_kv_write

        self._write, self._turn_and_write, self._paged_attention = kv_write, rotary_kv_write, paged_attention
        self._shape_class, self._scratch_shape = BatchShape, scratch_shape
        reason = self._why_not_cuda()
        self._decodes_by_cuda = reason is None
        logger.info("decode attention: %s", "CUDA C++" if reason is None else f"Triton ({reason})")

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        if reason := gpu.why_not(OpSpec(spec.device, spec.dtype)):
            return reason
        if reason := why_not_any(spec):
            return reason
        if spec.head_dim % 8 or spec.head_dim > _MOST_HEAD_DIM:
            return f"head_dim {spec.head_dim} is not a multiple of 8 up to {_MOST_HEAD_DIM}"
        if spec.block_size % _BLOCK_STEP:
            return f"block size {spec.block_size} is not a multiple of {_BLOCK_STEP}"
        if spec.kv_cache_dtype.startswith("fp8") and not gpu.has_fp8(spec.device):
            return "a KV cache in fp8 needs compute capability 8.9; try --kv-cache-dtype int8"
        return None

    @property
    def numerics_id(self) -> str:
        return f"{self.layout_id}-cuda_decode" if self._decodes_by_cuda else self.layout_id

    def _why_not_cuda(self) -> str | None:
        """None, or the reason decodes are Triton's."""
        spec = self.spec
        if spec.device != "cuda":
            return f"needs CUDA, got {spec.device}"
        if spec.batch_invariant:
            return "batch invariant: prefill has its bits"
        if not spec.cuda_decode:
            return "cuda_decode_attention is off"
        return cuda.decode_why_not(spec.dtype, self.layout, spec.num_heads // spec.num_kv_heads)

    def new_kv_cache(self, num_blocks: int) -> torch.Tensor:
        return torch.empty(self.layout.shape(num_blocks), dtype=torch.uint8, device=self.spec.device)

    def build_metadata(self, step: StepInputs) -> Metadata:
        """Bounds that the step does not give are asked of the device, which waits for it."""
        max_query_len, max_seq_len = step.max_query_len, step.max_seq_len
        if max_query_len is None:
            max_query_len = int(step.query_start_loc.diff().max())
        if max_seq_len is None:
            max_seq_len = int(step.seq_lens.max())
        return Metadata(step, max_query_len, max_seq_len)

    def _attend(self, q: torch.Tensor, kv_cache: torch.Tensor, metadata: Metadata, options: Options) -> torch.Tensor:
        step, shape = metadata.step, self._shape_class(metadata.max_query_len, metadata.max_seq_len)
        # Scratch is allocated anew each time: what is captured in a graph must be the graph's own.
        has_a_row_each = metadata.max_query_len == 1 and len(q) == len(step.seq_lens)
        if self._decodes_by_cuda and has_a_row_each and options.alibi_slopes is None:
            return cuda.decode_attention(
                q, kv_cache, step.block_table, step.seq_lens,
                layout=self.layout, options=options, max_seq_len=metadata.max_seq_len,
            )  # fmt: skip
        return self._paged_attention(
            q, kv_cache, step.block_table, step.seq_lens, step.query_start_loc,
            layout=self.layout, options=options, shape=shape, batch_invariant=self.spec.batch_invariant,
        )  # fmt: skip

    def scratch_bytes(self, num_reqs: int, max_seq_len: int) -> int:
        shape = self._shape_class(1, max_seq_len)
        return 4 * torch.Size(self._scratch_shape(num_reqs, shape, self.spec.num_heads, self.spec.head_dim)).numel()
