"""Who may hold which KV block. Owns ref counts, the free list and the prefix cache's index.

Knows nothing of requests, policies or tensors. A block is in one of three states:

    held      ref_cnt > 0, not in the free list
    cached    ref_cnt = 0, in the free list, named by the index: found again until it is reused
    empty     ref_cnt = 0, in the free list, without a name: reused before any cached one

With `has_null`, block 0 is in none of them: it stands in block tables where a window has passed, and belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from minivllm.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock
from minivllm.messages.kv_cache import NULL_BLOCK
from minivllm.messages.kv_events import AllBlocksCleared, BlockRemoved, KVCacheEvent
from minivllm.messages.stats import BLOCK_CACHED, BLOCK_EMPTY, BLOCK_HELD, BLOCK_SHARED


class BlockPool:
    """All blocks of the cache.

    Two blocks may hold equal content (requests that computed the same prefix side by side); the index names the
    first, and the second is reused first once it is free.
    """

    def __init__(
        self, num_blocks: int, events: list[KVCacheEvent] | None = None, *, has_null: bool = False
    ) -> None:
        """events: where to note what leaves the index, if somebody wants to know."""
        self._events = events
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self.null = self.blocks[NULL_BLOCK] if has_null else None
        if self.null is not None:
            self.null.ref_cnt = 1  # for ever
        self._usable = self.blocks[1:] if has_null else self.blocks
        self._free = FreeKVCacheBlockQueue(self._usable)
        self._by_hash: dict[bytes, KVCacheBlock] = {}

    @property
    def num_free_blocks(self) -> int:
        return self._free.num_free_blocks

    @property
    def num_blocks(self) -> int:
        """How many may be held."""
        return len(self._usable)

    @property
    def num_held_blocks(self) -> int:
        return len(self._usable) - self._free.num_free_blocks

    @property
    def usage(self) -> float:
        """Share of blocks held, 0 to 1. What is only cached counts as free."""
        return self.num_held_blocks / len(self._usable)

    def states(self, limit: int) -> tuple[int, bytes]:
        """A picture of the pool: the stride, and a byte (messages/stats.py) for every stride-th usable block.

        limit: bytes at most, so that a picture of a large pool costs no more than one of a small pool.
        """
        stride = max(1, -(-len(self._usable) // limit))
        # One expression, not a function a block: half the time.
        return stride, bytes(
            [
                (BLOCK_HELD if block.ref_cnt == 1 else BLOCK_SHARED)
                if block.ref_cnt
                else (BLOCK_EMPTY if block.block_hash is None else BLOCK_CACHED)
                for block in self._usable[::stride]
            ]
        )

    def get_cached_block(self, block_hash: bytes) -> KVCacheBlock | None:
        """The block with this content, held or not."""
        return self._by_hash.get(block_hash)

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Hold blocks that were found in the cache."""
        for block in blocks:
            if block.ref_cnt == 0:
                self._free.remove(block)
            block.ref_cnt += 1

    def allocate(self, num_blocks: int) -> list[KVCacheBlock]:
        """Hold `num_blocks` blocks of unknown content, evicting the least recently used from the cache."""
        blocks = self._free.popleft_n(num_blocks)
        if self._events is not None:
            evicted = [block.block_hash for block in blocks if block.block_hash is not None]
            if evicted:
                self._events.append(BlockRemoved(evicted))
        for block in blocks:
            block.ref_cnt = 1
            self._forget_content(block)
        return blocks

    def cache(self, block: KVCacheBlock, block_hash: bytes) -> bool:
        """Name a held block's content, now complete and confirmed. False: another block has that name."""
        assert block.ref_cnt > 0, f"{block} is named while nobody holds it"
        assert block.block_hash is None, f"{block} is named twice"
        if block_hash in self._by_hash:
            return False
        block.block_hash = block_hash
        self._by_hash[block_hash] = block
        return True

    def free(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Let go of one holder's blocks, first to last token."""
        # Freed tail first: a chain's tail is the least likely to be shared, so it should be evicted first.
        released = []
        for block in reversed(blocks):
            assert block.ref_cnt > 0, f"{block} is freed twice"
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                released.append(block)
        self._free.prepend([block for block in released if block.block_hash is None])
        self._free.extend([block for block in released if block.block_hash is not None])

    def reset_prefix_cache(self) -> bool:
        """Forget all content. Refused (False) while any block is held."""
        if self._free.num_free_blocks != len(self._usable):
            return False
        for block in list(self._by_hash.values()):
            self._forget_content(block)
        if self._events is not None:
            self._events.append(AllBlocksCleared())
        return True

    def _forget_content(self, block: KVCacheBlock) -> None:
        if block.block_hash is not None:
            del self._by_hash[block.block_hash]
            block.block_hash = None

    def check_integrity(self) -> None:
        """held + cached + empty = all, and the index agrees with the blocks.

        Raises:
            AssertionError: an invariant is broken; the message names the block.
        """
        free = list(self._free)
        assert len(free) == self._free.num_free_blocks, (
            f"free list: {len(free)} != {self._free.num_free_blocks}"
        )
        assert len({block.block_id for block in free}) == len(free), "a block is twice in the free list"
        assert {b.block_id for b in free} == {b.block_id for b in self.blocks if b.ref_cnt == 0}, (
            "free != unheld"
        )
        assert self.null is None or (self.null.ref_cnt, self.null.block_hash) == (1, None), f"{self.null} was used"
        for before, after in zip(free, free[1:]):
            assert after.prev_free is before, f"{after}: broken link"
        named = [block for block in self.blocks if block.block_hash is not None]
        assert len(named) == len(self._by_hash), (
            f"{len(named)} named blocks, {len(self._by_hash)} in the index"
        )
        for block in named:
            assert self._by_hash[block.block_hash] is block, f"{block} is not where the index says"
