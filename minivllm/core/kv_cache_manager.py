"""Which request holds which blocks. Turns tokens into blocks; asks no policy and moves no bytes."""

from __future__ import annotations

from minivllm.core.block_pool import BlockPool
from minivllm.core.kv_cache_utils import KVCacheBlock
from minivllm.core.request import Request
from minivllm.messages.kv_events import BlockStored, KVCacheEvent
from minivllm.messages.stats import PrefixCacheStats


def _runs(numbers: list[int]) -> list[range]:
    """Ascending numbers as stretches without a gap."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


class _BlockTable:
    """A request's blocks, first token to last, and how many of them have been offered to the cache."""

    __slots__ = ("blocks", "num_cached_blocks")

    def __init__(self, blocks: list[KVCacheBlock], num_cached_blocks: int) -> None:
        self.blocks = blocks
        self.num_cached_blocks = num_cached_blocks


class KVCacheManager:
    """Block tables over one `BlockPool`.

    A request is admitted with blocks for its first `num_tokens` tokens; then it grows block by block.
    """

    def __init__(self, num_blocks: int, block_size: int, *, record_events: bool = False) -> None:
        self.block_size = block_size
        self._events: list[KVCacheEvent] | None = [] if record_events else None
        self.pool = BlockPool(num_blocks, self._events)
        self._tables: dict[str, _BlockTable] = {}
        self._prefix_stats = PrefixCacheStats()

    def find_cached_prefix(self, request: Request) -> list[KVCacheBlock]:
        """The longest leading run of blocks already in the cache.

        The last token is always left to compute. A request that wants prompt logprobs finds nothing while it
        lacks any: they come from computing the prompt.
        """
        found: list[KVCacheBlock] = []
        for block_hash in self.findable_hashes(request):
            block = self.pool.get_cached_block(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def findable_hashes(self, request: Request) -> list[bytes]:
        """The blocks that this request would take from the cache, were they there."""
        if request.wants_prompt_logprobs or request.sampling_params.skip_reading_prefix_cache:
            return []
        return request.block_hashes[: (request.num_tokens - 1) // self.block_size]

    def num_blocks_lacking(self, num_tokens: int, cached_prefix: list[KVCacheBlock], num_kept: int = 0) -> int:
        """How many blocks are missing before a request can be admitted with `num_tokens`; 0 when it can.

        num_kept: blocks that must be free after it.
        """
        num_new = self._num_blocks(num_tokens) - len(cached_prefix)
        # A found block that nobody holds is itself in the free list, and will leave it.
        num_revived = sum(block.ref_cnt == 0 for block in cached_prefix)
        return max(0, num_new + num_revived + num_kept - self.pool.num_free_blocks)

    def admit(self, request: Request, cached_prefix: list[KVCacheBlock], num_tokens: int) -> list[int]:
        """Hold the found blocks and new ones for the first `num_tokens` tokens. Returns the whole block table."""
        assert request.request_id not in self._tables, f"{request.request_id} holds blocks already"
        self.pool.touch(cached_prefix)
        num_new = self._num_blocks(num_tokens) - len(cached_prefix)
        blocks = cached_prefix + self.pool.allocate(num_new)
        self._tables[request.request_id] = _BlockTable(blocks, len(cached_prefix))
        if request.num_preemptions == 0:  # a recompute is no news about the cache
            self._prefix_stats.queries += request.num_tokens
            self._prefix_stats.hits += len(cached_prefix) * self.block_size
        return [block.block_id for block in blocks]

    def extend(self, request: Request, num_tokens: int) -> list[int] | None:
        """Make room for the first `num_tokens` tokens. Returns the new block ids, or None when too few are free."""
        blocks = self._tables[request.request_id].blocks
        if num_tokens <= len(blocks) * self.block_size:
            return []
        num_new = self._num_blocks(num_tokens) - len(blocks)
        if num_new > self.pool.num_free_blocks:
            return None
        new_blocks = self.pool.allocate(num_new)
        blocks += new_blocks
        return [block.block_id for block in new_blocks]

    def cache_confirmed_blocks(self, request: Request) -> None:
        """Offer to the cache the blocks that confirmed tokens have filled."""
        num_full = min(request.num_confirmed_tokens // self.block_size, len(request.block_hashes))
        table = self._tables[request.request_id]
        stored = []
        for index in range(table.num_cached_blocks, num_full):
            if self.pool.cache(table.blocks[index], request.block_hashes[index]):
                stored.append(index)
            table.num_cached_blocks = index + 1
        if self._events is not None:
            self._events += [self._stored(request, run) for run in _runs(stored)]

    def _stored(self, request: Request, run: range) -> BlockStored:
        size, hashes = self.block_size, request.block_hashes
        return BlockStored(
            block_hashes=hashes[run.start : run.stop],
            parent_block_hash=hashes[run.start - 1] if run.start else None,
            token_ids=request.all_token_ids[run.start * size : run.stop * size],
            block_size=size,
        )

    def take_events(self) -> list[KVCacheEvent]:
        """What became findable and what ceased to be, in order, since the last call."""
        events = list(self._events or ())
        if events:
            self._events.clear()  # the pool writes to the same list
        return events

    def free(self, request: Request) -> None:
        """Let go of all its blocks; what was cached stays findable until it is reused."""
        self.pool.free(self._tables.pop(request.request_id).blocks)

    def block_ids(self, request: Request) -> list[int]:
        """Its block table; empty when it holds nothing."""
        table = self._tables.get(request.request_id)
        return [] if table is None else [block.block_id for block in table.blocks]

    @property
    def num_holders(self) -> int:
        """How many requests hold blocks."""
        return len(self._tables)

    def take_prefix_stats(self) -> PrefixCacheStats:
        """Queries and hits since the last call."""
        stats, self._prefix_stats = self._prefix_stats, PrefixCacheStats()
        return stats

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def check_integrity(self) -> None:
        """Each block is held as often as it stands in a table, and one still written to by one request only.

        Raises:
            AssertionError: an invariant is broken; the message names the block.
        """
        self.pool.check_integrity()
        num_holders = [0] * len(self.pool.blocks)
        for table in self._tables.values():
            for block in table.blocks:
                num_holders[block.block_id] += 1
        for block, expected in zip(self.pool.blocks, num_holders):
            assert block.ref_cnt == expected, f"{block} is in {expected} block tables"
        for request_id, table in self._tables.items():
            for block in table.blocks[table.num_cached_blocks :]:
                assert block.ref_cnt == 1, f"{block} is shared while {request_id} writes to it"
                assert block.block_hash is None, f"{block} is named while {request_id} writes to it"
