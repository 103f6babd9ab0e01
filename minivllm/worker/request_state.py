"""What the worker remembers of each request between steps: its tokens, its blocks, how far it is computed.

Owns rows: a request has one from when it is first scheduled until it is finished, preempted or not. Columns are
arrays, so that a step's inputs are gathered without a loop over tokens.
"""

from __future__ import annotations

import numpy as np

from minivllm.messages.worker import NewRequestData
from minivllm.ops.decode_step import TableColumns
from minivllm.worker.block_table import BlockTable, longer


class RequestTable:
    def __init__(self, num_rows: int, max_model_len: int, block_size: int, *, num_groups: int = 1) -> None:
        """num_rows: requests expected at once; more make the table grow. num_groups: of the KV cache."""
        self.row_of: dict[str, int] = {}
        self.blocks = [
            BlockTable(num_rows, -(-max_model_len // block_size), block_size) for _ in range(num_groups)
        ]
        self.token_ids = np.zeros((num_rows, max_model_len), np.int32)
        self.num_tokens = np.zeros(num_rows, np.int64)
        self.num_prompt_tokens = np.zeros(num_rows, np.int64)
        self.num_computed_tokens = np.zeros(num_rows, np.int64)
        self.version = 0  # of rows and blocks: another one whenever a request comes, goes or gets blocks
        self._free_rows = list(reversed(range(num_rows)))

    def add(self, request: NewRequestData) -> int:
        """Take a request in, with the tokens it already has; its row."""
        if not self._free_rows:
            self._grow()
        row = self.row_of[request.request_id] = self._free_rows.pop()
        num_prompt, num_prior = len(request.prompt_token_ids), len(request.prior_output_token_ids)
        self.token_ids[row, :num_prompt] = request.prompt_token_ids
        self.token_ids[row, num_prompt : num_prompt + num_prior] = request.prior_output_token_ids
        self.num_tokens[row] = num_prompt + num_prior
        self.num_prompt_tokens[row] = num_prompt
        self.num_computed_tokens[row] = request.num_computed_tokens
        self.replace_blocks(row, request.block_ids)
        return row

    def replace_blocks(self, row: int, block_ids: list[list[int]]) -> None:
        """block_ids: one list a KV cache group."""
        self.version += 1
        for blocks, ids in zip(self.blocks, block_ids, strict=True):
            blocks.replace(row, ids)

    def append_blocks(self, row: int, block_ids: list[list[int]]) -> None:
        """block_ids: one list a KV cache group."""
        self.version += 1
        for blocks, ids in zip(self.blocks, block_ids, strict=True):
            blocks.append(row, ids)

    def remove(self, request_id: str) -> int | None:
        """Forget a request; the row it had, None if it is not known."""
        row = self.row_of.pop(request_id, None)
        if row is not None:
            self.version += 1
            for blocks in self.blocks:
                blocks.clear(row)
            self._free_rows.append(row)
        return row

    def append_tokens(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """One more token for each row. The token after the longest context is nobody's input: it is not kept."""
        fits = self.num_tokens[rows] < self.token_ids.shape[1]
        rows, token_ids = rows[fits], token_ids[fits]
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1

    @property
    def columns(self) -> TableColumns:
        """As long as no request is added."""
        return TableColumns(self.num_computed_tokens, self.num_tokens, self.token_ids)

    def advance(self, rows: np.ndarray) -> None:
        """One more token for each row, whose id is not known yet; see `append_tokens`."""
        self.num_tokens[rows[self.num_tokens[rows] < self.token_ids.shape[1]]] += 1

    def rows(self, request_ids: list[str]) -> np.ndarray:
        """[len(request_ids)] int64. An unknown id raises KeyError."""
        return np.fromiter(
            (self.row_of[request_id] for request_id in request_ids), np.int64, len(request_ids)
        )

    def _grow(self) -> None:
        old = len(self.num_tokens)
        new = 2 * old
        for name in ("token_ids", "num_tokens", "num_prompt_tokens", "num_computed_tokens"):
            setattr(self, name, longer(getattr(self, name), new))
        for blocks in self.blocks:
            blocks.grow(new)
        self._free_rows.extend(reversed(range(old, new)))
