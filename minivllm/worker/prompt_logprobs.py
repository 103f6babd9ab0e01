"""Logprobs of the prompt's own tokens, and of others at their places, for the requests that asked.

Owns who asked for what, by table row. The token at position p predicts the one at p + 1; the prompt's last predicts
none of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from minivllm.messages.engine import LogprobsLists
from minivllm.messages.worker import ModelRunnerOutput
from minivllm.sample.logprobs import concatenate
from minivllm.sample.sampler import NONFINITE, Sampler
from minivllm.sampling_params import SamplingParams
from minivllm.worker.input_batch import InputBatch
from minivllm.worker.request_state import RequestTable

# Logits of a prompt held at once: a whole chunk over a large vocabulary is a gigabyte.
_ROWS_AT_ONCE = 64


class PromptLogprobs:
    def __init__(self, compute_logits: Callable[[torch.Tensor], torch.Tensor], sampler: Sampler) -> None:
        """compute_logits: hidden states [M, hidden_size] -> [M, vocab_size] float32."""
        self._compute_logits, self._sampler = compute_logits, sampler
        self._asked: dict[int, _Asked] = {}

    def add_request(self, row: int, params: SamplingParams) -> None:
        if params.scores_prompt:
            self._asked[row] = _Asked(params)

    def remove_request(self, row: int) -> None:
        self._asked.pop(row, None)

    def add_to(self, result: ModelRunnerOutput, batch: InputBatch, hidden: torch.Tensor, table: RequestTable) -> None:
        """Fill in what this step's tokens predict of prompts; hidden: [num_tokens, hidden_size]."""
        if not self._asked:
            return
        for i, row in enumerate(batch.rows.tolist()):
            if row not in self._asked:
                continue
            begin = int(batch.begins[i])
            end = min(int(batch.ends[i]), int(table.num_prompt_tokens[row]) - 1)
            if end <= begin:
                continue
            first = int(batch.first_rows[i])
            targets = torch.from_numpy(table.token_ids[row, begin + 1 : end + 1]).long()
            lists = self._score(hidden[first : first + end - begin], targets, begin, self._asked[row])
            if lists is None:
                result.failed[batch.request_ids[i]] = NONFINITE
            else:
                result.prompt_logprobs[batch.request_ids[i]] = lists

    def _score(self, hidden: torch.Tensor, targets: torch.Tensor, begin: int, asked: _Asked) -> LogprobsLists | None:
        """A row for each of `targets`, the tokens after positions begin …; None if a row of logits is not finite."""
        parts = []
        for rows, ids in zip(hidden.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE)):
            logits = self._compute_logits(rows)
            if self._sampler.nonfinite_rows(logits):
                return None
            end = begin + len(ids)
            also = None if asked.token_ids is None else asked.token_ids[begin:end]
            parts.append(self._sampler.logprobs_of(logits, ids, asked.num_logprobs, also))
            begin = end
        return concatenate(parts)


class _Asked:
    """What one request wants to know of each position of its prompt."""

    def __init__(self, params: SamplingParams) -> None:
        self.num_logprobs = params.prompt_logprobs or 0
        self.token_ids: torch.Tensor | None = None  # [num_prompt_tokens - 1, k] int64, -1 for none
        if params.prompt_logprob_token_ids is not None:
            asked = torch.tensor(params.prompt_logprob_token_ids, dtype=torch.int64)
            nothing = torch.full((params.prompt_logprob_start or 0, asked.shape[1]), -1)
            self.token_ids = torch.cat([nothing, asked])
