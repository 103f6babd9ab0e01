"""Which tokens a request may or may not choose, and by how much it favours some."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from minivllm.sample.step import LogitsStep, SampleBatch
from minivllm.sampling_params import SamplingParams

_MASKED = float("-inf")


class AllowedTokens(LogitsStep[torch.Tensor]):
    """`allowed_token_ids`: nothing else can be chosen."""

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> torch.Tensor | None:
        return self._token_tensor(params.allowed_token_ids) if params.allowed_token_ids else None

    def apply_one(self, logits: torch.Tensor, user: torch.Tensor, i: int, batch: SampleBatch) -> None:
        kept = logits[user]
        logits.fill_(_MASKED)
        logits[user] = kept


class BadWords(LogitsStep[list[list[int]]]):
    """`bad_words`: the last token of a word cannot follow the others, where they end the output."""

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> list[list[int]] | None:
        return params.bad_words_token_ids or None

    def apply_one(self, logits: torch.Tensor, user: list[list[int]], i: int, batch: SampleBatch) -> None:
        output = batch.token_ids[batch.rows[i], batch.num_prompt_tokens[i] : batch.num_tokens[i]]
        for *begin, last in user:
            if len(begin) <= len(output) and np.array_equal(output[len(output) - len(begin) :], begin):
                logits[last] = _MASKED


class _EndsLater(NamedTuple):
    min_tokens: int
    end_ids: torch.Tensor


class MinTokens(LogitsStep[_EndsLater]):
    """`min_tokens`: no end-of-sequence and no stop token until there are so many output tokens."""

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> _EndsLater | None:
        if not params.min_tokens:
            return None
        return _EndsLater(params.min_tokens, self._token_tensor([*eos_token_ids, *params.stop_token_ids]))

    def apply_one(self, logits: torch.Tensor, user: _EndsLater, i: int, batch: SampleBatch) -> None:
        if batch.num_output_tokens[i] < user.min_tokens:
            logits[user.end_ids] = _MASKED


class _Bias(NamedTuple):
    ids: torch.Tensor
    values: torch.Tensor


class LogitBias(LogitsStep[_Bias]):
    """`logit_bias`: added to the logits named."""

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> _Bias | None:
        if not params.logit_bias:
            return None
        inside = {int(i): v for i, v in params.logit_bias.items() if 0 <= int(i) < self.vocab_size}
        return _Bias(torch.tensor(list(inside), dtype=torch.int64), torch.tensor(list(inside.values())))

    def apply_one(self, logits: torch.Tensor, user: _Bias, i: int, batch: SampleBatch) -> None:
        logits[user.ids] += user.values
