"""What a parser of tool calls is: a generator that reads a model's text, and emits content and calls as it goes.

A parser for another format is a file with a subclass that has a `read`, and a line in `registry.py`.
"""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from minivllm.tool_parsers.pieces import Answer, CallArguments, CallEnd, CallStart, Content, Piece
from minivllm.utils.text_source import Reading, TextSource


class Malformed(Exception):
    """The text is not a call, or not any more."""


@dataclass(frozen=True)
class CallFormat:
    """How a model writes a call whose arguments are JSON: begin, the name, middle, the arguments, end.

    Grammars that force a call are made of it. quoted: the name is a JSON string. `first` and `last` stand around all
    calls, `separator` between two.
    """

    begin: str
    middle: str
    end: str
    quoted: bool = True
    separator: str = ""
    first: str = ""
    last: str = ""

    def spelt(self, name: str) -> str:
        """A function's name as it stands in a call."""
        return json.dumps(name, ensure_ascii=False) if self.quoted else name


class ToolParser(ABC):
    """Reads one answer. Feed it the text as it comes, then finish; what that returns, in order, is the answer.

    The same text gives the same answer however it is cut into pieces. Nothing is closed by guess: a call whose text
    breaks off is emitted as far as it goes, and marked. What looked like a call and shows itself to be none before its
    arguments begin stays content; what goes wrong later ends the call, marked, and the text goes on as content.

    White space next to a call belongs to the call's layout and is dropped.
    """

    # Whether its marks may be special tokens, which detokenization would hide.
    needs_special_tokens: ClassVar[bool] = False
    # How to make a model write calls in its own way; None: a JSON list of calls is asked of it instead.
    call_format: ClassVar[CallFormat | None] = None

    def __init__(self, tools: Sequence[dict[str, Any]] | None = None) -> None:
        """tools: the request's, each {"type": "function", "function": {"name", "parameters", …}}."""
        self._parameters = {
            tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools or ()
        }
        self.source = TextSource()
        self._pieces: list[Piece] = []
        self._num_calls = 0
        self._open = False  # a call has begun and not ended
        self._named: tuple[str, str | None] | None = None  # (name, id) of a call that is about to begin
        self._held = ""  # white space that belongs to the content, or to the layout of a call that follows
        self._reading = self.read()
        self._over = False

    def make_id(self) -> str:
        """The id of a call that the model gave none."""
        return f"chatcmpl-tool-{uuid.uuid4().hex}"

    @abstractmethod
    def read(self) -> Reading[None]:
        """Read `self.source` to its end."""

    def feed(self, text: str) -> list[Piece]:
        """More of the text; what it adds to the answer."""
        self.source.push(text)
        return self._go_on()

    def finish(self) -> list[Piece]:
        """The text is over; what that adds to the answer."""
        self.source.end()
        return self._go_on()

    def parse(self, text: str) -> Answer:
        """A whole text at once."""
        return Answer.of([*self.feed(text), *self.finish()])

    def _go_on(self) -> list[Piece]:
        if not self._over:
            try:
                next(self._reading)
            except StopIteration:
                self._over = True
                if self._held and not self._num_calls:
                    self._emit_content(self._held)
        pieces, self._pieces = self._pieces, []
        return pieces

    # --- what `read` is made of ---

    def content(self, text: str) -> None:
        """Text for the user."""
        kept = text.rstrip()
        if kept:
            self._emit_content(self._held + kept)
            self._held = text[len(kept) :]
        else:
            self._held += text

    def name(self, name: str, id: str | None = None) -> None:
        """A call is coming. If the text breaks off here, it is emitted without arguments, marked.

        Raises:
            Malformed: no function can have this name.
        """
        if not name or not _is_text(name):
            raise Malformed
        self._named = (name, id)

    def begin(self) -> None:
        """The call that was named begins: it is not content any more, whatever comes."""
        assert self._named is not None
        self._held = ""
        self._pieces.append(CallStart(self._num_calls, *self._named))
        self._named = None
        self._num_calls += 1
        self._open = True
        self.source.unmark()

    def arguments(self, text: str) -> None:
        if text:
            self._pieces.append(CallArguments(self._num_calls - 1, text))

    def end(self, *, complete: bool = True) -> None:
        self._pieces.append(CallEnd(self._num_calls - 1, complete))
        self._open = False
        self.source.mark()  # what follows is content if it is not another call

    def attempt(self, call: Reading[None], *, before: str = "") -> Reading[bool]:
        """Read one call, or several, with `call`; whether the last that began is complete.

        before: what of them was read already, which is content if they are none.
        """
        self.source.mark()
        self._named = None
        num_before = self._num_calls
        try:
            yield from call
            return True
        except Malformed:
            if self.source.exhausted and self._named is not None:
                self.begin()
            if self._open:
                self.end(complete=False)
                return False
            self.content(before * (self._num_calls == num_before) + self.source.since_mark())
            return self._num_calls > num_before
        finally:
            self.source.unmark()

    def expect(self, *literals: str) -> Reading[str]:
        """Raises Malformed unless one of these comes next."""
        found = yield from self.source.accept(*literals)
        if found is None:
            if self._num_calls:
                self._drop_cut(literals)
            raise Malformed
        return found

    def closing(self, *marks: str) -> Reading[None]:
        """Read what closes calls, if it comes next; of a text that ends within it, the beginning."""
        yield from self.source.spaces()
        if (yield from self.source.accept(*marks)) is None:
            self._drop_cut(marks)
        else:
            self.source.remark()

    def _drop_cut(self, marks: Sequence[str]) -> None:
        """Drop the rest of a text that ends within a mark."""
        rest = self.source.unread
        if self.source.ended and rest and any(mark.startswith(rest) for mark in marks):
            self.source.skip(len(rest))
            self.source.remark()

    def schema_of(self, function: str, parameter: str) -> dict[str, Any] | None:
        """What the request says of a function's parameter; None: nothing."""
        properties = self._parameters.get(function, {}).get("properties")
        found = properties.get(parameter) if isinstance(properties, dict) else None
        return found if isinstance(found, dict) else None

    def _emit_content(self, text: str) -> None:
        self._held = ""
        self._pieces.append(Content(text))


def _is_text(text: str) -> bool:
    """JSON and Python can spell half a surrogate pair, which no answer can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
