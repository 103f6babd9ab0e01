"""Which KV blocks each known request holds in one KV cache group, by table row. Ids only: the scheduler owns blocks.

Where a window has passed, an id may stand that belongs to another request by now: nobody reads it.
"""

from __future__ import annotations

import numpy as np


class BlockTable:
    def __init__(self, num_rows: int, max_blocks: int, block_size: int) -> None:
        """max_blocks: of one request; block_size: in tokens."""
        self.block_size = block_size
        self.block_ids = np.zeros((num_rows, max_blocks), np.int32)
        self.num_blocks = np.zeros(num_rows, np.int64)
        self.is_changed = np.zeros(num_rows, bool)  # since a copy of the row was last made; for who makes copies

    def replace(self, row: int, block_ids: list[int]) -> None:
        self.num_blocks[row] = 0
        self.append(row, block_ids)

    def append(self, row: int, block_ids: list[int]) -> None:
        begin = self.num_blocks[row]
        self.block_ids[row, begin : begin + len(block_ids)] = block_ids
        self.num_blocks[row] = begin + len(block_ids)
        self.is_changed[row] = True

    def clear(self, row: int) -> None:
        self.num_blocks[row] = 0

    def slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at `positions` of the requests in `rows` lie: block_id * block_size + offset."""
        blocks, offsets = np.divmod(positions, self.block_size)
        return self.block_ids[rows, blocks].astype(np.int64) * self.block_size + offsets

    def grow(self, num_rows: int) -> None:
        self.block_ids = longer(self.block_ids, num_rows)
        self.num_blocks = longer(self.num_blocks, num_rows)
        self.is_changed = longer(self.is_changed, num_rows)


def longer(array: np.ndarray, num_rows: int) -> np.ndarray:
    """A copy with more rows. (New pages are zero and untouched.)"""
    grown = np.zeros((num_rows, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
