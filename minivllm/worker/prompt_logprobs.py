"""Logprobs of the prompt's own tokens, and of others at their places, for the requests that asked.

Owns who asked for what, by table row. The token at position p predicts the one at p + 1; the prompt's last predicts
none of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from minivllm.messages.worker import ModelRunnerOutput
from minivllm.ops.op import OpSpec
from minivllm.ops.sampling import broken_rows
from minivllm.sample.logprobs import LogprobsReader, TokenValues, concatenate
from minivllm.sample.sampler import NONFINITE
from minivllm.sampling_params import SamplingParams
from minivllm.worker.buffers import Staging
from minivllm.worker.input_batch import InputBatch
from minivllm.worker.request_state import RequestTable

# Logits of a prompt held at once: a whole chunk over a large vocabulary is a gigabyte.
PROMPT_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class PromptScores:
    """What a step found of one prompt; where the device has memory of its own, on its way to the host's."""

    request_id: str
    parts: list[TokenValues]  # in order
    broken: list[torch.Tensor]  # [rows of the part] bool: what is no number

    def add_to(self, result: ModelRunnerOutput) -> None:
        """When it has arrived."""
        if any(part.any() for part in self.broken):
            result.failed[self.request_id] = NONFINITE
        else:
            result.prompt_logprobs[self.request_id] = concatenate([part.lists() for part in self.parts])


class PromptLogprobs:
    def __init__(
        self, compute_logits: Callable[[torch.Tensor], torch.Tensor], spec: OpSpec, staging: Staging
    ) -> None:
        """compute_logits: hidden states [M, hidden_size] -> [M, vocab_size] float32; spec: of the logits."""
        # Those of a prompt are logprobs of unprocessed logits, whatever --logprobs-mode says.
        self._compute_logits, self._read, self._staging = compute_logits, LogprobsReader(spec), staging
        self._asked: dict[int, _Asked] = {}

    def add_request(self, row: int, params: SamplingParams) -> None:
        if params.scores_prompt:
            self._asked[row] = _Asked(params)

    def remove_request(self, row: int) -> None:
        self._asked.pop(row, None)

    @property
    def is_idle(self) -> bool:
        """Whether nobody asks."""
        return not self._asked

    def score(self, batch: InputBatch, hidden: torch.Tensor, table: RequestTable) -> list[PromptScores]:
        """What this step's tokens predict of prompts; hidden: [num_tokens, hidden_size], or fewer while
        `is_idle`."""
        found: list[PromptScores] = []
        if not self._asked:
            return found
        for i, row in enumerate(batch.rows.tolist()):
            if row not in self._asked:
                continue
            begin = int(batch.begins[i])
            end = min(int(batch.ends[i]), int(table.num_prompt_tokens[row]) - 1)
            if end <= begin:
                continue
            first = int(batch.first_rows[i])
            rows, targets = hidden[first : first + end - begin], table.token_ids[row, begin + 1 : end + 1]
            found.append(self._score(batch.request_ids[i], rows, targets, begin, self._asked[row]))
        return found

    def _score(
        self, request_id: str, hidden: torch.Tensor, targets: np.ndarray, begin: int, asked: _Asked
    ) -> PromptScores:
        """A row for each of `targets`, the tokens after positions begin …"""
        scores = PromptScores(request_id, [], [])
        token_ids = self._staging.send(targets.astype(np.int64))
        also = None
        if asked.token_ids is not None:
            also = self._staging.send(asked.token_ids[begin : begin + len(targets)])
        for start in range(0, len(targets), PROMPT_ROWS_AT_ONCE):
            part = slice(start, start + PROMPT_ROWS_AT_ONCE)
            logits = self._compute_logits(hidden[part])
            values = self._read(
                logits, token_ids[part], asked.num_logprobs, None if also is None else also[part]
            )
            scores.parts.append(values.to_host(self._staging.fetch))
            scores.broken.append(self._staging.fetch(broken_rows(logits)))
        return scores


class _Asked:
    """What one request wants to know of each position of its prompt."""

    def __init__(self, params: SamplingParams) -> None:
        self.num_logprobs = params.prompt_logprobs or 0
        self.token_ids: np.ndarray | None = None  # [num_prompt_tokens - 1, k] int64, -1 for none
        if params.prompt_logprob_token_ids is not None:
            asked = np.array(params.prompt_logprob_token_ids, np.int64)
            nothing = np.full((params.prompt_logprob_start or 0, asked.shape[1]), -1)
            self.token_ids = np.concatenate([nothing, asked])
