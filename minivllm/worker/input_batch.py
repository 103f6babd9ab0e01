"""A step's tensors: which tokens run, at which positions, and where their keys and values go.

Owns the buffers, made once for the largest step; `prepare` fills their beginning. Knows nothing of the model.
A step that is the last one a token further, as most are, only moves the numbers in place on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from minivllm.attention.backend import StepInputs
from minivllm.ops.decode_step import DecodeBooks, StepColumns
from minivllm.worker.request_state import RequestTable


@dataclass(frozen=True)
class InputBatch:
    """One step, in the plan's batch order. Its tensors, `begins` and `ends` are views of buffers: the next step overwrites
    them, and if nothing else changes it is the same object."""

    request_ids: list[str]
    rows: np.ndarray  # [num_reqs] int64 in the request table
    begins: np.ndarray  # [num_reqs] int64: tokens computed before this step
    ends: np.ndarray  # [num_reqs] int64: and after it
    first_rows: np.ndarray  # [num_reqs] int64: of each request in input_ids
    # [num_sampled] int64: which requests get a token: those whose last known one is in the step.
    samples: np.ndarray
    input_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    steps: list[StepInputs]  # one a KV cache group; they differ in where keys and values lie
    is_decode: bool  # one token of each request, and each gets the next

    @property
    def sampled_rows(self) -> torch.Tensor:
        """[num_sampled] int64: rows of the hidden states that predict a new token."""
        last = self.first_rows + (self.ends - self.begins) - 1
        return torch.from_numpy(last[self.samples])


class InputBuffers:
    def __init__(self, max_num_tokens: int, max_num_reqs: int, max_blocks: int, *, num_groups: int = 1) -> None:
        self._input_ids = np.zeros(max_num_tokens, np.int64)
        self._positions = np.zeros(max_num_tokens, np.int64)
        self._slot_mapping = np.zeros((num_groups, max_num_tokens), np.int64)
        self._query_start_loc = np.zeros(max_num_reqs + 1, np.int32)
        self._seq_lens = np.zeros(max_num_reqs, np.int32)
        self._block_table = np.zeros((num_groups, max_num_reqs, max_blocks), np.int32)
        self._begins = np.zeros(max_num_reqs, np.int64)
        self._ends = np.zeros(max_num_reqs, np.int64)
        self._counting = np.arange(max_num_tokens)
        self.books: DecodeBooks | None = None  # of the last step, if it was a decode
        self._last: InputBatch | None = None
        self._version = 0  # of the table, when `_last` was made
        self._num_moves = 0  # how many tokens `_last` can move on before somebody's block is full

    def prepare(self, num_scheduled_tokens: dict[str, int], table: RequestTable) -> InputBatch:
        """The inputs of a step that computes so many tokens of each request, from where each one stands."""
        request_ids = list(num_scheduled_tokens)
        if self._is_same(request_ids, num_scheduled_tokens, table) and self.books.move_on():
            self._num_moves -= 1
        else:
            self._last = self._prepare(request_ids, num_scheduled_tokens, table)
            self._version = table.version
            self._num_moves = _num_moves(self._last, table)
            self.books = self._open_books(table) if self._last.is_decode else None
        return self._last

    def _is_same(self, request_ids: list[str], num_scheduled_tokens: dict[str, int], table: RequestTable) -> bool:
        """Whether this step is one token of the last one's requests, in the blocks that they had."""
        if not self._num_moves or self._version != table.version or request_ids != self._last.request_ids:
            return False
        return sum(num_scheduled_tokens.values()) == len(request_ids)

    def _open_books(self, table: RequestTable) -> DecodeBooks:
        num_reqs = len(self._last.rows)
        step = StepColumns(
            rows=self._last.rows,
            begins=self._last.begins,
            ends=self._last.ends,
            positions=self._positions[:num_reqs],
            seq_lens=self._seq_lens[:num_reqs],
            slots=self._slot_mapping[:, :num_reqs],
            input_ids=self._input_ids[:num_reqs],
        )
        return DecodeBooks(step, table.columns)

    def _prepare(self, request_ids: list[str], num_scheduled_tokens: dict[str, int], table: RequestTable) -> InputBatch:
        num_reqs = len(request_ids)
        rows = table.rows(request_ids)
        counts = np.fromiter(num_scheduled_tokens.values(), np.int64, num_reqs)
        begins, ends = self._begins[:num_reqs], self._ends[:num_reqs]
        begins[:] = table.num_computed_tokens[rows]
        np.add(begins, counts, out=ends)
        stops = np.cumsum(counts)
        first_rows = stops - counts
        num_tokens = int(stops[-1])

        row_of_token = np.repeat(rows, counts)
        positions = self._positions[:num_tokens]
        np.add(self._counting[:num_tokens], np.repeat(begins - first_rows, counts), out=positions)
        self._input_ids[:num_tokens] = table.token_ids[row_of_token, positions]
        self._query_start_loc[1 : num_reqs + 1] = stops
        self._seq_lens[:num_reqs] = ends
        query_start_loc = torch.from_numpy(self._query_start_loc[: num_reqs + 1])
        seq_lens = torch.from_numpy(self._seq_lens[:num_reqs])
        steps = []
        for blocks, block_table, slot_mapping in zip(table.blocks, self._block_table, self._slot_mapping):
            num_blocks = -(-int(ends.max()) // blocks.block_size)
            slot_mapping[:num_tokens] = blocks.slots(row_of_token, positions)
            block_table[:num_reqs, :num_blocks] = blocks.block_ids[rows, :num_blocks]
            steps.append(
                StepInputs(
                    query_start_loc=query_start_loc,
                    seq_lens=seq_lens,
                    block_table=torch.from_numpy(block_table[:num_reqs, :num_blocks]),
                    slot_mapping=torch.from_numpy(slot_mapping[:num_tokens]),
                )
            )
        samples = np.flatnonzero(ends == table.num_tokens[rows])
        return InputBatch(
            request_ids=request_ids,
            rows=rows,
            begins=begins,
            ends=ends,
            first_rows=first_rows,
            samples=samples,
            input_ids=torch.from_numpy(self._input_ids[:num_tokens]),
            positions=torch.from_numpy(positions),
            steps=steps,
            is_decode=num_tokens == num_reqs == len(samples),
        )


def _num_moves(batch: InputBatch, table: RequestTable) -> int:
    """How far each request of a decode can go on in its block, none filling it: then what they share may be more."""
    if not batch.is_decode:
        return 0
    block_size = table.blocks[0].block_size
    return max(0, block_size - 2 - int(((batch.ends - 1) % block_size).max()))
