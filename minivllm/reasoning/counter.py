"""How many of an answer's tokens are reasoning: a function of its token ids."""

from __future__ import annotations

from collections.abc import Sequence

from minivllm.utils.thinking import ThinkingTracker

MAX_BREAK_TOKENS = 2  # that a model or a template writes beside a mark


class ReasoningCounter:
    """Follows one answer. The marks around reasoning are no part of it."""

    def __init__(self, start: Sequence[int], end: Sequence[int], *, is_open: bool, anywhere: bool) -> None:
        """is_open: whether the answer begins with reasoning. anywhere: whether more may begin behind the first."""
        self._tracker = ThinkingTracker(start, end, is_open)
        self._len_end = len(end)
        # How many tokens may pass before reasoning begins; a mark behind them is text like any other.
        self._last_start = None if anywhere else len(start) + MAX_BREAK_TOKENS
        self._num_closed = 0  # in reasoning that has ended
        self._num_followed = 0
        self._is_over = False

    @property
    def num_tokens(self) -> int:
        return self._num_closed + (self._tracker.num_tokens if self._tracker.is_open else 0)

    def follow(self, token_ids: Sequence[int]) -> list[bool]:
        """Go on by output tokens; for each, whether it is reasoning or closes some."""
        return [self._follow_one(token_id) for token_id in token_ids]

    def _follow_one(self, token_id: int) -> bool:
        if self._is_over:
            return False
        tracker = self._tracker
        was_open = tracker.is_open
        tracker.follow(token_id)
        self._num_followed += 1
        if was_open and not tracker.is_open:
            self._num_closed += max(0, tracker.num_tokens - self._len_end)
            self._is_over = self._last_start is not None
        elif not tracker.is_open and self._last_start is not None:
            self._is_over = self._num_followed >= self._last_start
        return was_open or tracker.is_open
