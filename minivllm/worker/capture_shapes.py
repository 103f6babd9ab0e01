"""The shapes of decode steps that are captured: how many rows, and how long requests may be.

A captured step is launched for its shape, whatever the requests: fewer are padded with rows of none, and attention is
launched for a bound of their lengths. There are two bounds, so that short contexts need no merging of segments.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from minivllm.config.compilation import CaptureOptions

_SHORT = 1024  # tokens: a segment of attention
_DEFAULT_LARGEST = 512  # vLLM's; an eager step of more requests is no slower


class CaptureShapes:
    def __init__(self, options: CaptureOptions, max_num_seqs: int, max_seq_len: int) -> None:
        sizes = options.sizes or _default_sizes(min(max_num_seqs, options.largest or _DEFAULT_LARGEST), options.largest)
        # What is larger than one that holds all requests is never used.
        self.sizes = sizes[: bisect_left(sizes, max_num_seqs) + 1]
        self.lengths = (_SHORT, max_seq_len) if max_seq_len > _SHORT else (max_seq_len,)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """All (rows, bound of lengths), the largest first: what it allocates is there for those that follow."""
        return ((size, length) for size in reversed(self.sizes) for length in reversed(self.lengths))

    def __len__(self) -> int:
        return len(self.sizes) * len(self.lengths)

    def has(self, num_reqs: int) -> bool:
        """Whether a decode of so many requests is captured."""
        return num_reqs <= self.sizes[-1]

    def padded(self, num_reqs: int) -> int:
        """Rows of a decode of so many requests."""
        return self.sizes[bisect_left(self.sizes, num_reqs)] if self.has(num_reqs) else num_reqs

    def bound(self, seq_len: int) -> int:
        """What a captured decode is launched for, if its longest request has so many tokens."""
        return self.lengths[bisect_left(self.lengths, seq_len)]


def _default_sizes(most: int, largest: int | None) -> tuple[int, ...]:
    sizes = {default_size(num_reqs) for num_reqs in range(1, most + 1)}
    return tuple(sorted(sizes if largest is None else {min(size, largest) for size in sizes}))


def default_size(num_reqs: int) -> int:
    """1, 2, 4, 8, then steps of 8 or, if more, an eighth."""
    bits = (num_reqs - 1).bit_length()
    step = 1 << (bits if num_reqs <= 4 else max(3, bits - 4))
    return -(-num_reqs // step) * step
