"""Prompts given as vectors: which rows of a step have one in place of their token's embedding.

Owns the vectors, by row of the request table, for as long as their request is known. What is read is a function of the
position alone, so chunks, preemption and the prefix cache change nothing.
"""

from __future__ import annotations

import torch

from minivllm.layers.embedding import GivenEmbeddings
from minivllm.messages.engine import PromptEmbeds
from minivllm.worker.buffers import Staging
from minivllm.worker.input_batch import InputBatch


class PromptVectors:
    def __init__(self, dtype: torch.dtype, staging: Staging) -> None:
        """dtype: of the model."""
        self._dtype, self._staging = dtype, staging
        self._of_row: dict[int, torch.Tensor] = {}  # [num_prompt_tokens, hidden_size]

    def add_request(self, row: int, embeds: PromptEmbeds | None) -> None:
        if embeds is not None:
            given = torch.frombuffer(bytearray(embeds.data), dtype=getattr(torch, embeds.dtype))
            self._of_row[row] = given.view(-1, embeds.hidden_size).to(self._dtype)

    def remove_request(self, row: int) -> None:
        self._of_row.pop(row, None)

    def has(self, row: int) -> bool:
        """Whether the request in a row of the table has no tokens for a prompt."""
        return row in self._of_row

    @property
    def is_idle(self) -> bool:
        """No known request has any."""
        return not self._of_row

    def of_step(self, batch: InputBatch) -> GivenEmbeddings | None:
        """None where every row of the step is a token."""
        if not self._of_row:
            return None
        rows, values = [], []
        for i, row in enumerate(batch.rows.tolist()):
            vectors = self._of_row.get(row)
            begin = int(batch.begins[i])
            if vectors is None or begin >= len(vectors):
                continue
            end = min(int(batch.ends[i]), len(vectors))
            first = int(batch.first_rows[i])
            rows.append(torch.arange(first, first + end - begin))
            values.append(vectors[begin:end])
        if not rows:
            return None
        return GivenEmbeddings(self._staging.send(torch.cat(rows)), self._staging.send(torch.cat(values)))
