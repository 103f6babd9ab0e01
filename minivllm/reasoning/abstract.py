"""What a parser of reasoning is: where a model thinks and where it answers, in text and in token ids.

A parser for another format is a file with a subclass, and a line in `registry.py`. In text, a parser is fed an answer
as it comes and parts it; in token ids, `marks` say where reasoning ends, for who must know before there is text
(grammars that begin behind it, budgets that end it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from minivllm.reasoning.counter import MAX_BREAK_TOKENS, ReasoningCounter
from minivllm.utils.text_source import TextReader

MAX_TAIL_CHARS = 256
Encode = Callable[[str], Sequence[int]]


class Part(NamedTuple):
    """A piece of an answer."""

    is_reasoning: bool
    text: str


@dataclass(frozen=True)
class ReasoningMarks:
    """Reasoning in token ids. Its end is behind the first `end` that follows its beginning.

    start: what opens it, or () if nothing does: then an answer begins with it, unless the prompt has ended it.
    end: what closes it. begins_open: an answer begins with reasoning even if no `start` is seen.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    begins_open: bool

    def is_open_after(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether an answer behind this prompt begins with reasoning.

        The prompt says so if it ends with a mark, perhaps with line breaks behind; marks before are of other turns.
        """
        last_start, last_end = (
            _rfind(prompt_token_ids[-len(mark) - MAX_BREAK_TOKENS :], mark) if mark else -1
            for mark in (self.start, self.end)
        )
        if last_start < 0 and last_end < 0:
            return self.begins_open
        # The shorter tail's index is moved to the longer's count.
        return last_start - len(self.start) > last_end - len(self.end)


class ReasoningParser(TextReader[Part]):
    """Reads one answer and parts it.

    White space on both sides of the marks belongs to them and is dropped.
    """

    # What opens and closes reasoning; the first may be "", where nothing does.
    start_text: ClassVar[str]
    end_text: ClassVar[str]
    # Whether an answer is reasoning from its first character, though the model does not write `start_text`.
    begins_open: ClassVar[bool] = False
    # Whether more reasoning may follow within the answer.
    anywhere: ClassVar[bool] = False
    # Whether the marks may be special tokens, which detokenization would hide.
    needs_special_tokens: ClassVar[bool] = True
    # Formats that mix reasoning and calls: the parser of tool calls that reads all of such an answer.
    read_by_tool_parser: ClassVar[str | None] = None

    def __init__(self, *, begins_open: bool | None = None) -> None:
        """begins_open: whether this answer's prompt left reasoning open (see `open_after`); None: as the format is."""
        super().__init__()
        self.open_at_start = type(self).begins_open if begins_open is None else begins_open

    @classmethod
    def marks(cls, encode: Encode) -> ReasoningMarks:
        """encode: text to token ids, without special tokens added."""
        return ReasoningMarks(tuple(encode(cls.start_text)), tuple(encode(cls.end_text)), cls.begins_open)

    @classmethod
    def counter(cls, encode: Encode, *, is_open: bool) -> ReasoningCounter:
        """Counts the tokens of one answer's reasoning. is_open: what `open_after` said of its prompt."""
        marks = cls.marks(encode)
        return ReasoningCounter(marks.start, marks.end, is_open=is_open, anywhere=cls.anywhere)

    @classmethod
    def open_after(cls, prompt: str, continued: str | None = None) -> bool:
        """Whether an answer begins with reasoning behind this prompt: if it ends with a mark, that says so.

        continued: the beginning of the answer, if the prompt has one; what is open in it stays open.
        """
        if continued is not None:
            last_end = continued.rfind(cls.end_text)
            if cls.start_text and (last_start := continued.rfind(cls.start_text)) >= 0:
                return last_start > last_end
            return cls.begins_open and last_end < 0
        prompt = prompt[-MAX_TAIL_CHARS:].rstrip()
        if cls.start_text and prompt.endswith(cls.start_text.rstrip()):
            return True
        return cls.begins_open and not prompt.endswith(cls.end_text.rstrip())

    def reason(self, text: str) -> None:
        if text:
            self._found.append(Part(True, text))

    def answer(self, text: str) -> None:
        if text:
            self._found.append(Part(False, text))


def _rfind(ids: Sequence[int], wanted: tuple[int, ...]) -> int:
    n = len(wanted)
    return next((i for i in range(len(ids) - n, -1, -1) if tuple(ids[i : i + n]) == wanted), -1)
