"""A step's tensors: which tokens run, at which positions, and where their keys and values go.

Owns the buffers, made once for the largest step; `prepare` fills their beginning. Knows nothing of the model.
A step that is the last one a token further, as most are, only moves the numbers in place on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minivllm.attention.backend import StepInputs
from minivllm.ops.decode_step import DecodeBooks, StepColumns
from minivllm.worker.buffers import Staging
from minivllm.worker.capture_shapes import CaptureShapes
from minivllm.worker.request_state import RequestTable
from minivllm.worker.step_block_table import DeviceBlockTable, HostBlockTable, StepBlockTable

# Rows there is room for at least: a recording tells numbers of tokens, requests and more apart by what they may be.
_LEAST_ROWS = 64


@dataclass(frozen=True)
class InputBatch:
    """One step, in the plan's batch order. Its tensors, `begins` and `ends` are views of buffers: the next step
    overwrites them, and if nothing else changes it is the same object.

    The tensors may have more rows than there are tokens: rows of no request, whose keys and values are not written, and
    which see nothing.
    """

    request_ids: list[str]
    rows: np.ndarray  # [num_reqs] int64 in the request table
    begins: np.ndarray  # [num_reqs] int64: tokens computed before this step
    ends: np.ndarray  # [num_reqs] int64: and after it
    first_rows: np.ndarray  # [num_reqs] int64: of each request in input_ids
    # [num_sampled] int64: which requests get a token: those whose last known one is in the step.
    samples: np.ndarray
    num_tokens: int
    input_ids: torch.Tensor  # [num_tokens, or more] int64
    positions: torch.Tensor  # [num_tokens, or more] int64
    steps: list[StepInputs]  # one a KV cache group; they differ in where keys and values lie
    is_decode: bool  # one token of each request, and each gets the next
    wanted: torch.Tensor | None = None  # [W] int64, W > 0: rows of input_ids, see ForwardContext

    @property
    def last_rows(self) -> np.ndarray:
        """[num_reqs] int64: of each request's last token in this step."""
        return self.first_rows + (self.ends - self.begins) - 1

    @property
    def gives_only_tokens(self) -> bool:
        """Whether every request gets a token, and no other hidden state is wanted than those of their last tokens."""
        return self.wanted is not None and len(self.samples) == len(self.rows) == len(self.wanted)

    def sampled(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_sampled, hidden_size]: what predicts new tokens, of the hidden states that the model gave, on a host."""
        if self.wanted is not None and len(self.wanted) < self.num_tokens:
            return hidden[: len(self.samples)]
        return hidden[torch.from_numpy(self.last_rows[self.samples])]


class InputBuffers:
    def __init__(
        self,
        max_num_tokens: int,
        max_num_reqs: int,
        max_blocks: int,
        *,
        num_groups: int = 1,
        staging: Staging | None = None,
        captures: CaptureShapes | None = None,
        new_room: Callable[[int], Any] = lambda num_reqs: None,
    ) -> None:
        """captures: the shapes that decodes are padded to, if they are captured; new_room: the attention backend's."""
        staging = staging or Staging()
        most = max_num_reqs if captures is None else captures.padded(max_num_reqs)
        if not staging.copies:
            most = max(most, _LEAST_ROWS)
        max_num_tokens = max(max_num_tokens, most)
        self.most_tokens, self.most_reqs = max_num_tokens, most
        self._staging, self._captures = staging, captures
        self._input_ids = staging.mirror((max_num_tokens,), np.int64)
        self._positions = staging.mirror((max_num_tokens,), np.int64)
        self._slot_mapping = [staging.mirror((max_num_tokens,), np.int64) for _ in range(num_groups)]
        self._query_start_loc = staging.mirror((most + 1,), np.int32)
        self._seq_lens = staging.mirror((most,), np.int32)
        self._wanted = torch.zeros(max_num_tokens, dtype=torch.int64)
        self._block_table: list[StepBlockTable] = [
            DeviceBlockTable(most, max_blocks, staging) if staging.copies else HostBlockTable(most, max_blocks)
            for _ in range(num_groups)
        ]
        self._rooms = [None if staging.copies else new_room(most) for _ in range(num_groups)]
        self._begins = np.zeros(most, np.int64)
        self._ends = np.zeros(most, np.int64)
        self._counting = np.arange(max_num_tokens + 1)
        self.books: DecodeBooks | None = None  # of the last step, if it was a decode
        self._last: InputBatch | None = None
        self._version = 0  # of the table, when `_last` was made
        self._num_moves = 0  # how many tokens `_last` can move on before somebody's block is full

    def prepare(
        self, num_scheduled_tokens: dict[str, int], table: RequestTable, *, wants_all: bool = False
    ) -> InputBatch:
        """The inputs of a step that computes so many tokens of each request, from where each one stands.

        wants_all: hidden states are read of more than the tokens that predict a new one.
        """
        request_ids = list(num_scheduled_tokens)
        if self._is_same(request_ids, num_scheduled_tokens, table) and self.books.move_on():
            self._num_moves -= 1
        else:
            self._last = self._prepare(request_ids, num_scheduled_tokens, table, wants_all)
            self._version = table.version
            can_move = self._last.is_decode and not self._staging.copies
            self._num_moves = _num_moves(self._last, table) if can_move else 0
            self.books = self._open_books(table) if can_move else None
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
            positions=self._positions.host[:num_reqs],
            seq_lens=self._seq_lens.host[:num_reqs],
            slots=[slot_mapping.host[:num_reqs] for slot_mapping in self._slot_mapping],
            input_ids=self._input_ids.host[:num_reqs],
        )
        return DecodeBooks(step, table.columns)

    def _prepare(
        self, request_ids: list[str], num_scheduled_tokens: dict[str, int], table: RequestTable, wants_all: bool
    ) -> InputBatch:
        num_reqs = len(request_ids)
        rows = table.rows(request_ids)
        counts = np.fromiter(num_scheduled_tokens.values(), np.int64, num_reqs)
        begins, ends = self._begins[:num_reqs], self._ends[:num_reqs]
        begins[:] = table.num_computed_tokens[rows]
        np.add(begins, counts, out=ends)
        stops = np.cumsum(counts)
        first_rows = stops - counts
        num_tokens = int(stops[-1])
        samples = np.flatnonzero(ends == table.num_tokens[rows])
        is_decode = num_tokens == num_reqs == len(samples)
        is_captured = is_decode and self._captures is not None and self._captures.has(num_reqs)
        num_rows, num_tokens_padded = num_reqs, num_tokens
        if is_captured:
            num_rows = num_tokens_padded = self._captures.padded(num_reqs)

        row_of_token = np.repeat(rows, counts)
        positions = self._positions.host[:num_tokens]
        np.add(self._counting[:num_tokens], np.repeat(begins - first_rows, counts), out=positions)
        self._input_ids.host[:num_tokens] = table.token_ids[row_of_token, positions]
        self._query_start_loc.host[1 : num_reqs + 1] = stops
        self._seq_lens.host[:num_reqs] = ends
        num_blocks = -(-int(ends.max()) // table.blocks[0].block_size)
        for blocks, block_table, slot_mapping in zip(table.blocks, self._block_table, self._slot_mapping):
            slot_mapping.host[:num_tokens] = blocks.slots(row_of_token, positions)
            block_table.of_step(blocks, rows, num_blocks)
        self._pad(slice(num_tokens, num_tokens_padded), slice(num_reqs, num_rows))
        wanted, bounds = None, {}
        if not self._staging.copies:
            wanted = self._want(self._counting[:num_tokens] if wants_all else stops[samples] - 1)
        else:
            self._upload(num_tokens_padded, num_rows)
            longest = int(ends.max())
            max_seq_len = self._captures.bound(longest) if is_captured else longest
            bounds = {"max_query_len": int(counts.max()), "max_seq_len": max_seq_len}
        return InputBatch(
            request_ids=request_ids,
            rows=rows,
            begins=begins,
            ends=ends,
            first_rows=first_rows,
            samples=samples,
            num_tokens=num_tokens,
            input_ids=self._input_ids.device[:num_tokens_padded],
            positions=self._positions.device[:num_tokens_padded],
            steps=self._steps(num_tokens_padded, num_rows, **bounds),
            is_decode=is_decode,
            wanted=wanted,
        )

    def padding(self, num_rows: int, max_seq_len: int) -> InputBatch:
        """A decode of this shape with no request in it, for a capture."""
        self._query_start_loc.host[0] = 0
        self._pad(slice(0, num_rows), slice(0, num_rows))
        self._upload(num_rows, num_rows)
        nobody = np.empty(0, np.int64)
        return InputBatch(
            request_ids=[],
            rows=nobody,
            begins=nobody,
            ends=nobody,
            first_rows=nobody,
            samples=nobody,
            num_tokens=0,
            input_ids=self._input_ids.device[:num_rows],
            positions=self._positions.device[:num_rows],
            steps=self._steps(num_rows, num_rows, max_query_len=1, max_seq_len=max_seq_len),
            is_decode=True,
        )

    def made_up(self, lens: tuple[int, ...]) -> InputBatch:
        """A step of prompts of these lengths that are written nowhere, before there are requests, on a host."""
        ends = np.cumsum(lens)
        num_tokens, num_reqs = int(ends[-1]), len(lens)
        self._input_ids.host[:num_tokens] = self._counting[:num_tokens]
        self._positions.host[:num_tokens] = np.concatenate([self._counting[:length] for length in lens])
        for slot_mapping in self._slot_mapping:
            slot_mapping.host[:num_tokens] = -1
        self._query_start_loc.host[1 : num_reqs + 1] = ends
        self._seq_lens.host[:num_reqs] = lens
        wanted = self._want(ends - 1)
        input_ids, positions, _, steps = self.of_sizes(num_tokens, num_reqs, len(wanted))
        nobody = np.empty(0, np.int64)
        return InputBatch(
            request_ids=[],
            rows=np.arange(num_reqs),
            begins=nobody,
            ends=nobody,
            first_rows=nobody,
            samples=nobody,
            num_tokens=num_tokens,
            input_ids=input_ids,
            positions=positions,
            steps=steps,
            is_decode=False,
            wanted=wanted,
        )

    def of_sizes(
        self, num_tokens: int, num_reqs: int, num_wanted: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[StepInputs]]:
        """Token ids, positions, wanted rows and what attention reads of a step of so many, for a recording: they hold
        anything."""
        ids, positions = self._input_ids.device[:num_tokens], self._positions.device[:num_tokens]
        return ids, positions, self._wanted[:num_wanted], self._steps(num_tokens, num_reqs)

    def ends(self, num_reqs: int) -> np.ndarray:
        """Where `InputBatch.ends` of so many requests lies."""
        return self._ends[:num_reqs]

    def _want(self, rows: np.ndarray) -> torch.Tensor:
        """These rows, or where there are none the first: no kernel need know of nothing."""
        wanted = self._wanted[: max(1, len(rows))]
        wanted.numpy()[:] = rows if len(rows) else 0
        return wanted

    def _steps(self, num_tokens: int, num_rows: int, **bounds: int) -> list[StepInputs]:
        """What attention reads, as views of the buffers; one a KV cache group."""
        return [
            StepInputs(
                query_start_loc=self._query_start_loc.device[: num_rows + 1],
                seq_lens=self._seq_lens.device[:num_rows],
                block_table=block_table.view(num_rows),
                slot_mapping=slot_mapping.device[:num_tokens],
                room=room,
                **bounds,
            )
            for block_table, slot_mapping, room in zip(self._block_table, self._slot_mapping, self._rooms)
        ]

    def _pad(self, tokens: slice, requests: slice) -> None:
        """Rows that see nothing and are written nowhere; each is one of these requests."""
        self._input_ids.host[tokens] = 0
        self._positions.host[tokens] = 0
        for slot_mapping in self._slot_mapping:
            slot_mapping.host[tokens] = -1
        self._seq_lens.host[requests] = 0
        ends = self._query_start_loc.host[requests.start + 1 : requests.stop + 1]
        ends[:] = tokens.start + self._counting[1 : len(ends) + 1]

    def _upload(self, num_tokens: int, num_rows: int) -> None:
        for mirror in (self._input_ids, self._positions, *self._slot_mapping):
            mirror.upload(num_tokens)
        self._seq_lens.upload(num_rows)
        self._query_start_loc.upload(num_rows + 1)


def _num_moves(batch: InputBatch, table: RequestTable) -> int:
    """How far each request of a decode can go on in its block, none filling it: then what they share may be more."""
    if not batch.is_decode:
        return 0
    block_size = table.blocks[0].block_size
    return max(0, block_size - 2 - int(((batch.ends - 1) % block_size).max()))
