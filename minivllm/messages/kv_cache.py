"""The KV cache as the two sides must agree on it: sizes, never tensors."""

from __future__ import annotations

import msgspec


class KVCacheSpec(msgspec.Struct, frozen=True):
    """One block of one layer, and how many layers hold one."""

    block_size: int  # tokens
    block_bytes: int  # of one block in one layer, K and V together
    num_layers: int
    layout_id: str

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return self.block_bytes * self.num_layers
