"""Which request holds which blocks. Turns tokens into blocks; asks no policy and moves no bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from minivllm.core.attention_groups import AttentionGroups
from minivllm.core.block_pool import BlockPool
from minivllm.core.kv_cache_utils import KVCacheBlock, extra_keys
from minivllm.core.request import Request
from minivllm.messages.kv_cache import ONE_FULL_GROUP, KVCacheGroup, has_null_block
from minivllm.messages.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from minivllm.messages.stats import PrefixCacheStats

BlockIds = list[list[int]]  # one list a group; [] where there is nothing to say


def _runs(numbers: list[int]) -> list[range]:
    """Ascending numbers as stretches without a gap."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


class CachedPrefix(NamedTuple):
    """A leading part of a request that need not be computed."""

    num_blocks: int
    found: list[list[KVCacheBlock]]  # one list a group: its last blocks; a window needs none before
    next_hash: bytes | None = None  # of the full block that follows, had it been found too


class _BlockTable:
    """A request's blocks in one group, first token to last. The first `num_passed` are null."""

    __slots__ = ("blocks", "num_passed")

    def __init__(self, blocks: list[KVCacheBlock], num_passed: int) -> None:
        self.blocks = blocks
        self.num_passed = num_passed

    @property
    def held(self) -> list[KVCacheBlock]:
        return self.blocks[self.num_passed :] if self.num_passed else self.blocks


class _Holding:
    """All that a request holds, and how many blocks of each table have been offered to the cache."""

    __slots__ = ("tables", "num_tokens", "num_cached_blocks")

    def __init__(self, tables: list[_BlockTable], num_tokens: int, num_cached_blocks: int) -> None:
        self.tables = tables  # one a group
        self.num_tokens = num_tokens  # that have room in every group
        self.num_cached_blocks = num_cached_blocks


class KVCacheManager:
    """Block tables over one `BlockPool`: for each request one in each group of layers (see messages/kv_cache.py).

    A request is admitted with blocks for its first `num_tokens` tokens; then it grows block by block. In the table of a
    window, blocks that it has passed are let go of, and the null block takes their place.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        groups: Sequence[KVCacheGroup] = ONE_FULL_GROUP,
        step_tokens: int = 0,
        record_events: bool = False,
    ) -> None:
        """step_tokens: at most so many tokens of a request are computed before `cache_confirmed_blocks` hears of it."""
        self.block_size = block_size
        self._events: list[KVCacheEvent] | None = [] if record_events else None
        self.pool = BlockPool(num_blocks, self._events, has_null=has_null_block(groups))
        self.groups = groups
        self._step_tokens = step_tokens
        self._agreement = AttentionGroups(groups, block_size)
        self._windowed = [index for index, group in enumerate(groups) if group.sliding_window is not None]
        # A block's name in the index is its hash and its group: equal tokens fill one block in each.
        self._tags = [bytes([index]) for index in range(len(groups))] if len(groups) > 1 else [b""]
        self._nothing_found: list[list[KVCacheBlock]] = [[] for _ in groups]
        self._holdings: dict[str, _Holding] = {}
        self._prefix_stats = PrefixCacheStats()
        self.prefix_totals = PrefixCacheStats()  # since the start

    def find_cached_prefix(self, request: Request) -> CachedPrefix:
        """The longest leading run of blocks already in the cache, in all groups as far as each needs it.

        The last token is always left to compute. A request that wants prompt logprobs finds nothing while it
        lacks any: they come from computing the prompt.
        """
        must_compute = request.wants_prompt_logprobs or request.sampling_params.skip_reading_prefix_cache
        hashes = [] if must_compute else request.block_hashes
        num_findable = min(len(hashes), (request.num_tokens - 1) // self.block_size)
        tags, get = self._tags, self.pool.get_cached_block

        def is_cached(groups: list[int], index: int) -> bool:
            for group in groups:
                if get(hashes[index] + tags[group]) is None:
                    return False
            return True

        num_blocks = self._agreement.longest_hit(num_findable, is_cached)
        next_hash = hashes[num_blocks] if num_blocks < num_findable else None
        if num_blocks == 0:
            return CachedPrefix(0, self._nothing_found, next_hash)
        found = []
        for group, tag in zip(self.groups, tags):
            first = group.num_passed_blocks(num_blocks * self.block_size, self.block_size)
            found.append([get(block_hash + tag) for block_hash in hashes[first:num_blocks]])
        return CachedPrefix(num_blocks, found, next_hash)

    def num_blocks_lacking(self, num_tokens: int, prefix: CachedPrefix, num_kept: int = 0) -> int:
        """How many blocks are missing before a request can be admitted with `num_tokens`; 0 when it can.

        num_kept: blocks that must be free after it.
        """
        num_wanted = sum(self._nums_new(num_tokens, prefix)) + num_kept
        if prefix.num_blocks:
            # A found block that nobody holds is itself in the free list, and will leave it.
            num_wanted += sum(block.ref_cnt == 0 for blocks in prefix.found for block in blocks)
        return max(0, num_wanted - self.pool.num_free_blocks)

    def _nums_new(self, num_tokens: int, prefix: CachedPrefix) -> list[int]:
        """How many blocks a request takes in each group when it is admitted, beyond those found."""
        if not self._windowed:
            return [self._num_blocks(num_tokens) - prefix.num_blocks] * len(self.groups)
        num_computed = prefix.num_blocks * self.block_size
        return [
            self._num_blocks(group.num_tokens_to_hold(num_tokens, num_computed, self._step_tokens)) - prefix.num_blocks
            for group in self.groups
        ]

    def admit(self, request: Request, prefix: CachedPrefix, num_tokens: int) -> BlockIds:
        """Hold the found blocks and new ones for the first `num_tokens` tokens. Returns its block tables.

        A window holds blocks for as many of these tokens as it needs at once.
        """
        assert request.request_id not in self._holdings, f"{request.request_id} holds blocks already"
        for blocks in prefix.found:
            self.pool.touch(blocks)
        tables = []
        for found, num_new in zip(prefix.found, self._nums_new(num_tokens, prefix)):
            num_passed = prefix.num_blocks - len(found)
            blocks = [self.pool.null] * num_passed + found + self.pool.allocate(num_new)
            tables.append(_BlockTable(blocks, num_passed))
        self._holdings[request.request_id] = _Holding(tables, self._room(tables), prefix.num_blocks)
        if request.num_preemptions == 0:  # a recompute is no news about the cache
            for stats in (self._prefix_stats, self.prefix_totals):
                stats.queries += request.num_tokens
                stats.hits += prefix.num_blocks * self.block_size
        return [[block.block_id for block in table.blocks] for table in tables]

    def extend(self, request: Request, num_tokens: int) -> BlockIds | None:
        """Make room for the first `num_tokens` tokens. Returns the new block ids, or None when too few are free."""
        holding = self._holdings[request.request_id]
        if num_tokens <= holding.num_tokens:
            return []
        if self._windowed:
            self._let_windows_pass(holding, request.num_confirmed_tokens)
        num_wanted, num_new = self._num_blocks(num_tokens), 0
        for table in holding.tables:
            num_new += max(0, num_wanted - len(table.blocks))
        if num_new > self.pool.num_free_blocks:
            return None
        block_ids = []
        for table in holding.tables:
            new_blocks = self.pool.allocate(max(0, num_wanted - len(table.blocks)))
            table.blocks += new_blocks
            block_ids.append([block.block_id for block in new_blocks])
        holding.num_tokens = num_wanted * self.block_size  # the shortest tables are now so long
        return block_ids

    def cache_confirmed_blocks(self, request: Request) -> None:
        """Offer to the cache the blocks that confirmed tokens have filled, and let windows pass."""
        hashes, holding, cache = request.block_hashes, self._holdings[request.request_id], self.pool.cache
        num_full = min(request.num_confirmed_tokens // self.block_size, len(hashes))
        filled = range(holding.num_cached_blocks, num_full)
        for group, table in enumerate(holding.tables):
            blocks, tag = table.blocks, self._tags[group]
            stored = [index for index in filled if cache(blocks[index], hashes[index] + tag)]
            if self._events is not None:
                self._events += [self._stored(request, group, run) for run in _runs(stored)]
        holding.num_cached_blocks = max(holding.num_cached_blocks, num_full)
        if self._windowed:
            self._let_windows_pass(holding, request.num_confirmed_tokens)

    def _let_windows_pass(self, holding: _Holding, num_confirmed_tokens: int) -> None:
        """Let go of what no token after the confirmed ones reads. It has been offered to the cache before."""
        for index in self._windowed:
            table, group = holding.tables[index], self.groups[index]
            num_before, num_passed = table.num_passed, group.num_passed_blocks(num_confirmed_tokens, self.block_size)
            if num_passed > num_before:
                self.pool.free(table.blocks[num_before:num_passed])
                table.blocks[num_before:num_passed] = [self.pool.null] * (num_passed - num_before)
                table.num_passed = num_passed

    def _stored(self, request: Request, group: int, run: range) -> BlockStored:
        size, hashes = self.block_size, request.block_hashes
        keys = [extra_keys(request, index * size, (index + 1) * size) or None for index in run]
        return BlockStored(
            block_hashes=hashes[run.start : run.stop],
            parent_block_hash=hashes[run.start - 1] if run.start else None,
            token_ids=request.all_token_ids[run.start * size : run.stop * size],
            block_size=size,
            lora_name=None if request.lora is None else request.lora.name,
            extra_keys=keys if any(keys) else None,
            group_idx=group if len(self.groups) > 1 else None,
        )

    def take_events(self) -> list[KVCacheEvent]:
        """What became findable and what ceased to be, in order, since the last call."""
        events = list(self._events or ())
        if not events:
            return events
        self._events.clear()  # the pool writes to the same list
        if len(self.groups) == 1:
            return events
        return [each for event in events for each in self._told_by_group(event)]

    def _told_by_group(self, event: KVCacheEvent) -> list[KVCacheEvent]:
        """The pool knows only names; who listens gets each one's hash and group."""
        if not isinstance(event, BlockRemoved):
            return [event]
        by_group = [[name[:-1] for name in event.block_hashes if name.endswith(tag)] for tag in self._tags]
        return [BlockRemoved(hashes, group_idx=group) for group, hashes in enumerate(by_group) if hashes]

    def free(self, request: Request) -> None:
        """Let go of all its blocks; what was cached stays findable until it is reused."""
        for table in self._holdings.pop(request.request_id).tables:
            self.pool.free(table.held)

    def block_ids(self, request: Request) -> BlockIds:
        """Its block tables; empty when it holds nothing."""
        holding = self._holdings.get(request.request_id)
        return [] if holding is None else [[block.block_id for block in table.blocks] for table in holding.tables]

    def num_tokens_with_room(self, request: Request) -> int:
        """How many of its first tokens have their blocks, in every group."""
        return self._holdings[request.request_id].num_tokens

    @property
    def num_holders(self) -> int:
        """How many requests hold blocks."""
        return len(self._holdings)

    def take_prefix_stats(self) -> PrefixCacheStats:
        """Queries and hits since the last call."""
        stats, self._prefix_stats = self._prefix_stats, PrefixCacheStats()
        return stats

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _room(self, tables: list[_BlockTable]) -> int:
        return min([len(table.blocks) for table in tables]) * self.block_size

    def check_integrity(self) -> None:
        """Each block is held as often as it stands in a table, and one still written to by one request only.

        Raises:
            AssertionError: an invariant is broken; the message names the block.
        """
        self.pool.check_integrity()
        num_holders = [0] * len(self.pool.blocks)
        if self.pool.null is not None:
            num_holders[self.pool.null.block_id] = 1
        for holding in self._holdings.values():
            for table in holding.tables:
                for block in table.held:
                    num_holders[block.block_id] += 1
        for block, expected in zip(self.pool.blocks, num_holders):
            assert block.ref_cnt == expected, f"{block} is in {expected} block tables"
        for request_id, holding in self._holdings.items():
            assert len(holding.tables) == len(self.groups), f"{request_id} lacks a table"
            assert holding.num_tokens == self._room(holding.tables), f"{request_id} has room for {holding.num_tokens}"
            for table, tag in zip(holding.tables, self._tags):
                self._check_table(request_id, table, tag, holding.num_cached_blocks)

    def _check_table(self, request_id: str, table: _BlockTable, tag: bytes, num_cached: int) -> None:
        nulls = [block is self.pool.null for block in table.blocks]
        assert nulls == [index < table.num_passed for index in range(len(nulls))], f"{request_id}: nulls {nulls}"
        for block in table.held:
            assert block.block_hash is None or block.block_hash.endswith(tag), f"{block} is of another group"
        for block in table.blocks[max(num_cached, table.num_passed) :]:
            assert block.ref_cnt == 1, f"{block} is shared while {request_id} writes to it"
            assert block.block_hash is None, f"{block} is named while {request_id} writes to it"
