"""Which tokens a request may or may not choose, and by how much it favours some."""

from __future__ import annotations

from typing import NamedTuple

import torch

from minivllm.sample.step import LogitsStep, SampleBatch
from minivllm.sampling_params import SamplingParams

_MASKED = float("-inf")


class AllowedTokens(LogitsStep[torch.Tensor]):
    """`allowed_token_ids`: nothing else can be chosen."""

    field = "allowed_token_ids"

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> torch.Tensor | None:
        return self._token_tensor(params.allowed_token_ids) if params.allowed_token_ids else None

    def apply_one(self, logits: torch.Tensor, user: torch.Tensor, i: int, batch: SampleBatch) -> None:
        kept = logits[user]
        logits.fill_(_MASKED)
        logits[user] = kept

    def forbids(self, user: torch.Tensor, i: int, batch: SampleBatch) -> bool:
        return True


class _Words(NamedTuple):
    single: torch.Tensor  # words of one token
    longer: list[tuple[list[int], int]]  # all tokens of a word but the last, and the last
    longest: int


class BadWords(LogitsStep[_Words]):
    """`bad_words`: the last token of a word cannot follow the others, where they end the output."""

    field = "bad_words"

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> _Words | None:
        words = params.bad_words_token_ids
        if not words:
            return None
        longer = [(word[:-1], word[-1]) for word in words if len(word) > 1]
        single = self._token_tensor([word[0] for word in words if len(word) == 1])
        return _Words(single, longer, max(map(len, words)))

    def apply_one(self, logits: torch.Tensor, user: _Words, i: int, batch: SampleBatch) -> None:
        logits[user.single] = _MASKED
        if not user.longer:
            return
        end = batch.num_tokens[i]
        begin = max(batch.num_prompt_tokens[i], end - user.longest)
        tail = batch.token_ids[batch.rows[i], begin:end].tolist()
        masked = [last for before, last in user.longer if tail[-len(before) :] == before]
        if masked:
            logits[masked] = _MASKED

    def forbids(self, user: _Words, i: int, batch: SampleBatch) -> bool:
        return True


class _EndsLater(NamedTuple):
    min_tokens: int
    end_ids: torch.Tensor


class MinTokens(LogitsStep[_EndsLater]):
    """`min_tokens`: no end-of-sequence and no stop token until there are so many output tokens."""

    field = "min_tokens"

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> _EndsLater | None:
        if not params.min_tokens:
            return None
        return _EndsLater(params.min_tokens, self._token_tensor([*eos_token_ids, *params.stop_token_ids]))

    def apply_one(self, logits: torch.Tensor, user: _EndsLater, i: int, batch: SampleBatch) -> None:
        if self.forbids(user, i, batch):
            logits[user.end_ids] = _MASKED

    def forbids(self, user: _EndsLater, i: int, batch: SampleBatch) -> bool:
        return bool(batch.num_output_tokens[i] < user.min_tokens)


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
