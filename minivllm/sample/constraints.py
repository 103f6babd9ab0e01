"""Which tokens a request may or may not choose, and by how much it favours some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from minivllm.sample.step import Edit, EditsLogits, LogitsChanges, LogitsStep, SampleBatch
from minivllm.sampling_params import SamplingParams

_MASKED = float("-inf")


class _Allowed(NamedTuple):
    token_ids: np.ndarray  # [k] int64
    words: np.ndarray  # the same, as in LogitsChanges


class AllowedTokens(LogitsStep[_Allowed]):
    """`allowed_token_ids`: nothing else can be chosen."""

    field = "allowed_token_ids"

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> _Allowed | None:
        if not params.allowed_token_ids:
            return None
        token_ids = self._inside(params.allowed_token_ids)
        bits = np.zeros(32 * -(-self.vocab_size // 32), np.uint8)
        bits[token_ids] = 1
        return _Allowed(token_ids, np.packbits(bits, bitorder="little").view(np.uint32))

    def apply_one(self, logits: torch.Tensor, user: _Allowed, i: int, batch: SampleBatch) -> None:
        ids = torch.from_numpy(user.token_ids)
        kept = logits[ids]
        logits.fill_(_MASKED)
        logits[ids] = kept

    def describe_one(self, user: _Allowed, i: int, batch: SampleBatch, changes: LogitsChanges) -> None:
        changes.allow_only(i, user.words)

    def forbids(self, user: _Allowed, i: int, batch: SampleBatch) -> bool:
        return True


class _Words(NamedTuple):
    single: Edit  # words of one token
    longer: list[tuple[list[int], Edit]]  # all tokens of a word but the last two, and what follows from those
    longest: int


class BadWords(EditsLogits[_Words]):
    """`bad_words`: the last token of a word cannot follow the others, where they end the output."""

    field = "bad_words"

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> _Words | None:
        words = params.bad_words_token_ids
        if not words:
            return None
        longer = [
            (word[:-2], _forbid(self._inside(word[-1:]), behind=word[-2])) for word in words if len(word) > 1
        ]
        single = _forbid(self._inside([word[0] for word in words if len(word) == 1]))
        return _Words(single, longer, max(map(len, words)))

    def edits(self, user: _Words, i: int, batch: SampleBatch) -> Iterator[Edit]:
        if len(user.single.token_ids):
            yield user.single
        end = int(batch.num_tokens[i]) - 1  # of what is surely known
        begin = max(int(batch.num_prompt_tokens[i]), end - user.longest)
        if begin > end or not user.longer:  # there is no output yet
            return
        tail = batch.token_ids[batch.rows[i], begin:end].tolist()
        for before, edit in user.longer:
            if not before or tail[-len(before) :] == before:
                yield edit

    def forbids(self, user: _Words, i: int, batch: SampleBatch) -> bool:
        return True


class _EndsLater(NamedTuple):
    min_tokens: int
    ends: Edit


class MinTokens(EditsLogits[_EndsLater]):
    """`min_tokens`: no end-of-sequence and no stop token until there are so many output tokens."""

    field = "min_tokens"

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> _EndsLater | None:
        if not params.min_tokens:
            return None
        return _EndsLater(params.min_tokens, _forbid(self._inside([*eos_token_ids, *params.stop_token_ids])))

    def edits(self, user: _EndsLater, i: int, batch: SampleBatch) -> Iterator[Edit]:
        if self.forbids(user, i, batch):
            yield user.ends

    def forbids(self, user: _EndsLater, i: int, batch: SampleBatch) -> bool:
        return bool(batch.num_output_tokens[i] < user.min_tokens)


class LogitBias(EditsLogits[Edit]):
    """`logit_bias`: added to the logits named."""

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> Edit | None:
        if not params.logit_bias:
            return None
        inside = {int(i): v for i, v in params.logit_bias.items() if 0 <= int(i) < self.vocab_size}
        return Edit(np.array(list(inside), np.int64), np.array(list(inside.values()), np.float32))

    def edits(self, user: Edit, i: int, batch: SampleBatch) -> Iterator[Edit]:
        yield user


def _forbid(token_ids: np.ndarray, *, behind: int = -1) -> Edit:
    return Edit(token_ids, np.full(len(token_ids), _MASKED, np.float32), behind)
