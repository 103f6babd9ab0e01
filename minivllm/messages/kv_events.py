"""What a subscriber hears of the KV cache: which prefixes it holds. vLLM's event names and field order.

A message is three frames: the topic, a sequence number (8 bytes, big endian), a `KVEventBatch` in MessagePack. A gap in
the numbers is a loss. Append new fields last, with a default.
"""

from __future__ import annotations

from typing import Any

import msgspec


class BlockStored(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    """Consecutive blocks that can now be found. Each hash names the whole prefix up to the block's end."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None  # of the block before the first; None: a prompt begins here
    token_ids: list[int]  # of these blocks; zeros where the prompt was given as embeddings
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None  # of each block: what keeps it from equal tokens, kind first
    group_idx: int | None = None  # of a model with several KV cache groups: each holds a block of its own


class BlockRemoved(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    """Blocks that were handed out again for something else."""

    block_hashes: list[bytes]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    """The whole cache was reset."""


KVCacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """All events of one engine step, in order."""

    ts: float  # seconds since 1970
    events: list[KVCacheEvent]
    data_parallel_rank: int | None = None
