"""Repetition, frequency and presence penalties (Keskar et al. 2019, arXiv:1909.05858, and OpenAI's two)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from minivllm.sample.step import LogitsChanges, LogitsStep, Penalised, SampleBatch
from minivllm.sampling_params import SamplingParams


class _Counts:
    """One request's distinct tokens and how often each is in the output, kept up as the request grows."""

    def __init__(self, penalised: Penalised, vocab_size: int) -> None:
        self.repetition, self.frequency, self.presence = penalised
        self.num_seen = 0  # tokens of the request already counted
        self._in_output = np.zeros(vocab_size, np.int32)
        self._known = np.zeros(vocab_size, bool)
        self._distinct = np.empty(vocab_size, np.int64)
        self._num_distinct = 0

    def catch_up(self, token_ids: np.ndarray, num_prompt_tokens: int, first: int) -> None:
        """token_ids: all the request's tokens so far, of which the first `num_seen` are counted; first: see
        SampleBatch.first_token."""
        self.num_seen = max(self.num_seen, first)
        new = np.unique(token_ids[self.num_seen :])
        new = new[~self._known[new]]
        self._known[new] = True
        self._distinct[self._num_distinct : self._num_distinct + len(new)] = new
        self._num_distinct += len(new)
        np.add.at(self._in_output, token_ids[max(self.num_seen, num_prompt_tokens) :], 1)
        self.num_seen = len(token_ids)

    def penalise(self, logits: np.ndarray) -> None:
        """logits: [vocab_size] float32, in place: repetition over prompt and output, the others over output."""
        distinct = self._distinct[: self._num_distinct]
        count = self._in_output[distinct].astype(np.float32)
        chosen = logits[distinct]
        chosen = np.where(chosen > 0, chosen / self.repetition, chosen * self.repetition)
        logits[distinct] = chosen - self.frequency * count - self.presence * (count > 0).astype(np.float32)


@dataclass
class _Penalties:
    """One request's, and its counts where they are the host's."""

    penalised: Penalised
    counts: _Counts | None = None


class Penalties(LogitsStep[_Penalties]):
    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> _Penalties | None:
        # Python floats: they take the dtype of the array they meet.
        penalised = Penalised(
            float(params.repetition_penalty), float(params.frequency_penalty), float(params.presence_penalty)
        )
        return None if penalised == Penalised(1.0, 0.0, 0.0) else _Penalties(penalised)

    def apply_one(self, logits: torch.Tensor, user: _Penalties, i: int, batch: SampleBatch) -> None:
        if user.counts is None:
            user.counts = _Counts(user.penalised, self.vocab_size)
        tokens = batch.token_ids[batch.rows[i], : batch.num_tokens[i]]
        user.counts.catch_up(tokens, int(batch.num_prompt_tokens[i]), batch.first_token(i))
        user.counts.penalise(logits.numpy())

    def describe_one(self, user: _Penalties, i: int, batch: SampleBatch, changes: LogitsChanges) -> None:
        changes.penalties[i] = user.penalised
