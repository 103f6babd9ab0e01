"""The engine of formats that put reasoning between two marks, at the beginning of an answer."""

from __future__ import annotations

from typing import ClassVar

from minivllm.reasoning.abstract import ReasoningParser
from minivllm.utils.text_source import Reading


class TaggedReasoningParser(ReasoningParser):
    """An answer that does not begin with the mark has no reasoning, unless it comes `anywhere`."""

    other_starts: ClassVar[tuple[str, ...]] = ()  # other spellings of the marks
    other_ends: ClassVar[tuple[str, ...]] = ()

    def read(self) -> Reading[None]:
        starts, ends = (self.start_text, *self.other_starts), (self.end_text, *self.other_ends)
        spaces = yield from self.source.spaces()
        found = yield from self.source.accept(*starts)
        opened = found is not None or self.open_at_start
        if not opened:
            self.answer(spaces)
        while True:
            if not opened:
                _, found = yield from self.source.until(*starts if self.anywhere else "\0", emit=self.answer)
                if found is None:
                    return
            yield from self.source.spaces()
            _, found = yield from self.source.until(*ends, emit=self._reason_without_trailing_space)
            if found is None:
                self.reason(self._held)
                return
            self._held = ""
            yield from self.source.spaces()
            opened = False

    _held = ""  # white space that is dropped if the mark follows

    def _reason_without_trailing_space(self, text: str) -> None:
        text = self._held + text
        kept = text.rstrip()
        self._held = text[len(kept) :]
        self.reason(kept)
