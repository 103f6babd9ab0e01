"""`thinking_token_budget`: once a model has thought for so many tokens, the end of thinking is all it may write."""

from __future__ import annotations

from copy import copy

import torch

from minivllm.sample.step import Forced, LogitsChanges, LogitsStep, SampleBatch
from minivllm.sampling_params import SamplingParams
from minivllm.utils.thinking import ThinkingTracker, thinking_before_form


class _Thinker:
    """One request, followed as it grows. only_first: behind its first thinking, or its first token, nothing counts."""

    def __init__(self, budget: int, end: list[int], tracker: ThinkingTracker, *, only_first: bool) -> None:
        self.budget, self.end, self.tracker = budget, end, tracker
        self.num_followed = 0  # output tokens
        self._only_first, self._is_over = only_first, False

    def follow(self, token_id: int) -> None:
        self.num_followed += 1
        if not self._is_over:
            self.tracker.follow(token_id)
            self._is_over = self._only_first and not self.tracker.is_open

    def forced_token(self) -> int | None:
        """The only token that may come next, if the budget is spent: the end's first, then the rest of it."""
        num_over = self.tracker.num_tokens - self.budget
        if not self.tracker.is_open or num_over < 0:
            return None
        return self.end[num_over % len(self.end)]

    def forced_behind_next(self) -> Forced:
        """What `forced_token` will be when the next output token is known, which only matters if a mark has it."""
        otherwise = self._forced_behind(_NO_MARK)
        behind = {token: self._forced_behind(token) for token in self.tracker.marks}
        return Forced({token: forced for token, forced in behind.items() if forced != otherwise}, otherwise)

    def _forced_behind(self, token_id: int) -> int:
        then = copy(self)
        then.tracker = copy(self.tracker)
        then.follow(token_id)
        forced = then.forced_token()
        return -1 if forced is None else forced


_NO_MARK = -1  # a token that no mark has


class ThinkingBudget(LogitsStep[_Thinker]):
    """Output tokens count, from the start of thinking on; if it starts again, again from 0.

    In an answer that must have a form, only thinking before that counts: what looks like its marks there is the form's.
    """

    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> _Thinker | None:
        marks = params.thinking
        if params.thinking_token_budget is None or marks is None:
            return None
        has_form = params.structured_outputs is not None
        make_tracker = thinking_before_form if has_form else ThinkingTracker
        tracker = make_tracker(marks.start, marks.end, marks.is_open)
        if tracker is None:
            return None
        return _Thinker(params.thinking_token_budget, marks.end, tracker, only_first=has_form)

    def apply_one(self, logits: torch.Tensor, user: _Thinker, i: int, batch: SampleBatch) -> None:
        self._follow(user, i, batch, batch.num_tokens[i])
        forced = user.forced_token()
        if forced is not None:
            logits.fill_(float("-inf"))
            logits[forced] = 0.0

    def describe_one(self, user: _Thinker, i: int, batch: SampleBatch, changes: LogitsChanges) -> None:
        end = int(batch.num_tokens[i]) - 1
        if end < batch.num_prompt_tokens[i]:  # no output yet
            otherwise = user.forced_token()
            forced = Forced({}, -1 if otherwise is None else otherwise)
        else:
            self._follow(user, i, batch, end)
            forced = user.forced_behind_next()
        if forced.behind or forced.otherwise >= 0:
            changes.forced[i] = forced

    @staticmethod
    def _follow(user: _Thinker, i: int, batch: SampleBatch, end: int) -> None:
        """Up to a position."""
        begin = batch.num_prompt_tokens[i] + user.num_followed
        for token in batch.token_ids[batch.rows[i], begin:end].tolist():
            user.follow(token)
