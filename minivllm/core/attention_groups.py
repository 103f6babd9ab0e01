"""Which cached prefix all of a model's KV cache groups agree on. Rules only: holds no blocks.

A full-attention group needs every block of the prefix; a sliding window of w tokens needs the last
ceil((w - 1) / block_size) of them, for nothing before is ever read again. So a window's hits may have holes, and a
shorter prefix may be found where a longer one is not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from minivllm.messages.kv_cache import KVCacheGroup

# (groups, index of a block) -> is it in the cache for each of these groups?
IsCached = Callable[[list[int], int], bool]


class AttentionGroups:
    """The groups, sorted by kind once: those of one kind are looked up together."""

    def __init__(self, groups: Sequence[KVCacheGroup], block_size: int) -> None:
        self._full: list[int] = []
        windowed: defaultdict[int, list[int]] = defaultdict(list)  # blocks needed before a hit's end -> groups
        for index, group in enumerate(groups):
            if group.sliding_window is None:
                self._full.append(index)
            else:
                windowed[-(-(group.sliding_window - 1) // block_size)].append(index)
        self._windowed = list(windowed.items())

    def longest_hit(self, num_blocks: int, is_cached: IsCached) -> int:
        """How many of the first `num_blocks` blocks need not be computed.

        Any leading part of what the full groups find they find as well, so they are asked once. Each kind of window
        may shorten the hit, and must then be asked again about the shorter one.
        """
        hit = self._full_hit(num_blocks, is_cached) if self._full else num_blocks
        settled = False
        while not settled:
            before = hit
            for num_needed, groups in self._windowed:
                hit = _window_hit(hit, num_needed, groups, is_cached)
            settled = hit == before or len(self._windowed) == 1
        return hit

    def _full_hit(self, num_blocks: int, is_cached: IsCached) -> int:
        for index in range(num_blocks):
            if not is_cached(self._full, index):
                return index
        return num_blocks


def _window_hit(limit: int, num_needed: int, groups: list[int], is_cached: IsCached) -> int:
    """The longest hit of at most `limit` blocks whose last `num_needed` (all, if it is shorter) are cached."""
    run = 0  # consecutive blocks found, from the right
    for index in reversed(range(limit)):
        if run == num_needed:
            return index + 1 + run
        run = run + 1 if is_cached(groups, index) else 0
    return run
