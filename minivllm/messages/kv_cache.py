"""The KV cache as the two sides must agree on it: sizes and who shares a block table, never tensors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import msgspec

NULL_BLOCK = 0  # with windows, the block that stands in a table where a window has passed; never read or written


class KVCacheGroup(msgspec.Struct, frozen=True):
    """Layers of one kind that share block tables: a block holds the keys and values of all of them."""

    layers: tuple[int, ...] = ()  # indices in the model
    sliding_window: int | None = None  # tokens that a token sees, itself included; None: all before it

    def num_passed_blocks(self, num_tokens: int, block_size: int) -> int:
        """Leading blocks that nobody reads any more once the first `num_tokens` tokens are computed."""
        if self.sliding_window is None:
            return 0
        return max(0, num_tokens - self.sliding_window + 1) // block_size

    def num_tokens_to_hold(self, num_tokens: int, num_computed_tokens: int, step_tokens: int) -> int:
        """For how many of its first `num_tokens` tokens a request that starts at `num_computed_tokens` gets blocks.

        Full attention: all. A window moves on at the end of each step (of `step_tokens` at most), and what it has
        passed is enough for the step after the next.
        """
        if self.sliding_window is None:
            return num_tokens
        return min(num_tokens, max(num_computed_tokens, self.sliding_window - 1) + step_tokens)

    def most_blocks(self, num_tokens: int, step_tokens: int, block_size: int) -> int:
        """Blocks that a request of `num_tokens` tokens ever holds at once."""
        num_blocks = -(-num_tokens // block_size)
        if self.sliding_window is None:
            return num_blocks
        # What a step of `step_tokens` reads and writes, lying across block borders as badly as it can.
        span = self.sliding_window - 1 + step_tokens
        return min(num_blocks, -(-(span - 1) // block_size) + 1)


ONE_FULL_GROUP: tuple[KVCacheGroup, ...] = (KVCacheGroup(),)


def has_null_block(groups: Sequence[KVCacheGroup]) -> bool:
    """Whether NULL_BLOCK is kept out of use: only windows need it."""
    return any(group.sliding_window is not None for group in groups)


def blocks_of_request(
    groups: Sequence[KVCacheGroup], num_tokens: int, step_tokens: int, block_size: int
) -> int:
    """Blocks of the pool that one request of `num_tokens` tokens ever holds at once, over all groups.

    step_tokens: at most so many of them are computed between two times that windows move on.
    """
    return sum(group.most_blocks(num_tokens, step_tokens, block_size) for group in groups)


def longest_request(
    groups: Sequence[KVCacheGroup], num_blocks: int, step_tokens: int, block_size: int, *, limit: int
) -> int:
    """The most tokens, up to `limit`, that one request may have when it has the whole cache to itself."""
    usable = num_blocks - has_null_block(groups)
    lengths = range(1, limit + 1)
    return bisect_right(lengths, usable, key=lambda n: blocks_of_request(groups, n, step_tokens, block_size))


def num_tokens_held(
    groups: Sequence[KVCacheGroup], num_blocks: int, max_model_len: int, step_tokens: int, block_size: int
) -> int:
    """Tokens that the cache holds in requests of `max_model_len`; with one full group, in any."""
    per_request = blocks_of_request(groups, max_model_len, step_tokens, block_size)
    usable = num_blocks - has_null_block(groups)
    return usable * -(-max_model_len // block_size) * block_size // per_request


class KVCacheSpec(msgspec.Struct, frozen=True):
    """One block: the same number of bytes whichever group holds it."""

    block_size: int  # tokens
    block_bytes: int  # of one block in one layer, K and V together
    num_layers: int  # that one block has room for: those of the largest group
    layout_id: str
    groups: Sequence[KVCacheGroup] = ONE_FULL_GROUP
    step_tokens: int = 0  # computed of one request between two times that windows move on

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over the layers it has room for."""
        return self.block_bytes * self.num_layers

    def blocks_of_request(self, num_tokens: int) -> int:
        """Blocks that one request of `num_tokens` tokens ever holds at once."""
        return blocks_of_request(self.groups, num_tokens, self.step_tokens, self.block_size)

    def longest_request(self, num_blocks: int, limit: int) -> int:
        """The most tokens, up to `limit`, of one request that has `num_blocks` blocks to itself."""
        return longest_request(self.groups, num_blocks, self.step_tokens, self.block_size, limit=limit)
