"""Where in an answer a model thinks: a function of its output tokens, followed one by one."""

from __future__ import annotations

from collections.abc import Sequence


class ThinkingTracker:
    """`start` opens and `end` closes; the marks themselves count as neither. Without a start nothing opens it again."""

    def __init__(self, start: Sequence[int], end: Sequence[int], is_open: bool) -> None:
        """is_open: whether the answer begins with thinking."""
        self._start, self._end = tuple(start), tuple(end)
        self._tail: tuple[int, ...] = ()
        self._longest = max(len(self._start), len(self._end))
        self.is_open = is_open
        self.num_tokens = 0  # since it was opened

    @property
    def marks(self) -> set[int]:
        """The tokens that any other is not the like of."""
        return {*self._start, *self._end}

    def follow(self, token_id: int) -> None:
        """Go on by one output token."""
        self._tail = (*self._tail, token_id)[-self._longest :]
        if self.is_open:
            self.num_tokens += 1
            self.is_open = self._tail[-len(self._end) :] != self._end
        elif self._start and self._tail[-len(self._start) :] == self._start:
            self.is_open, self.num_tokens = True, 0


def thinking_before_form(start: Sequence[int], end: Sequence[int], is_open: bool) -> ThinkingTracker | None:
    """What may precede the form that an answer must have: thinking that is open already, or that its first token opens.

    What looks like a mark behind that is a part of the form.
    """
    return ThinkingTracker(start, end, is_open) if is_open or len(start) == 1 else None
