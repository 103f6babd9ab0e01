"""A step's block table, from the host's tables to where attention reads it: copied, or followed on a device.

A device has a copy of the host's table. A request keeps its row there (`request_state.py`), so its blocks are sent
once, and again only when it gets more or others. A step reads rows in its own order: they are gathered on the device,
and where the batch is the last one's, and nobody got a block, nothing is sent or done at all. All of it is work given
to the device in order: what changes a row comes behind the steps that read it as it was, and before the one that needs
it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from minivllm.worker.block_table import BlockTable
from minivllm.worker.buffers import Staging


class StepBlockTable(Protocol):
    """Of one KV cache group."""

    def of_step(self, blocks: BlockTable, rows: np.ndarray, num_blocks: int) -> None:
        """Have the leading num_blocks of the requests in these rows of the table. Between the staging's `begin` and
        `end`, once a step."""

    def view(self, num_rows: int) -> torch.Tensor:
        """[num_rows, max_blocks] int32, where attention reads: all of each row, for what a recorded or captured step
        reads has one shape, whatever the requests' lengths. Behind a request's blocks, and the step's requests, stands
        anything."""


class HostBlockTable:
    """Where the device's memory is the host's."""

    def __init__(self, most_rows: int, max_blocks: int) -> None:
        self._table = np.zeros((most_rows, max_blocks), np.int32)
        self._as_tensor = torch.from_numpy(self._table)

    def of_step(self, blocks: BlockTable, rows: np.ndarray, num_blocks: int) -> None:
        self._table[: len(rows), :num_blocks] = blocks.block_ids[rows, :num_blocks]

    def view(self, num_rows: int) -> torch.Tensor:
        return self._as_tensor[:num_rows]


class DeviceBlockTable:
    """Where it is not."""

    def __init__(self, most_rows: int, max_blocks: int, staging: Staging) -> None:
        """most_rows: of a step."""
        self._changed = staging.mirror((most_rows, max_blocks), np.int32)
        self._changed_rows, self._rows = (staging.mirror((most_rows,), np.int64) for _ in range(2))
        self._of_step = torch.zeros_like(self._changed.device)  # stays where it is: captured steps read it
        self._table = self._of_step.new_zeros(0, max_blocks)
        self._last = np.empty(0, np.int64)  # the rows that lie in `_of_step`

    def of_step(self, blocks: BlockTable, rows: np.ndarray, num_blocks: int) -> None:
        if len(self._table) < len(blocks.block_ids):
            self._grow(len(blocks.block_ids))
        changed = rows[blocks.is_changed[rows]]
        if len(changed):
            self._follow(blocks, changed)
        if len(changed) or not np.array_equal(rows, self._last):
            count = len(rows)
            self._rows.host[:count] = self._last = rows
            self._rows.upload(count)
            torch.index_select(self._table, 0, self._rows.device[:count], out=self._of_step[:count])

    def view(self, num_rows: int) -> torch.Tensor:
        return self._of_step[:num_rows]

    def _grow(self, num_rows: int) -> None:
        """As the host's has. Captured steps do not read this one."""
        grown = self._table.new_zeros(num_rows, self._table.shape[1])
        grown[: len(self._table)] = self._table
        self._table = grown

    def _follow(self, blocks: BlockTable, rows: np.ndarray) -> None:
        """Send these rows of the host's table."""
        count = len(rows)
        self._changed.host[:count] = blocks.block_ids[rows]
        self._changed_rows.host[:count] = rows
        self._changed.upload(count)
        self._changed_rows.upload(count)
        self._table.index_copy_(0, self._changed_rows.device[:count], self._changed.device[:count])
        blocks.is_changed[rows] = False
