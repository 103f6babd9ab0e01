"""What a parser of tool calls is: a generator that reads a model's text, and emits content and calls as it goes.

A parser for another format is a file with a subclass that has a `read`, and a line in `registry.py`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from minivllm.tool_parsers.json_reader import json_value
from minivllm.tool_parsers.pieces import Answer, CallArguments, CallEnd, CallStart, Content, Piece
from minivllm.utils.text_source import Malformed, Reading, TextReader

MAX_NAME_CHARS = 256  # of a function's name, where its end must be looked for
_MAX_REFERENCES = 8  # of schemas, one to the next


@dataclass(frozen=True)
class CallFormat:
    """How a model writes a call whose arguments are JSON: begin, the name, middle, the arguments, end.

    Grammars that force a call are made of it. quoted: the name is a JSON string. number: a regular expression of what
    stands between the name and middle, and tells calls apart. `first` and `last` stand around all
    calls, `separator` between two. `trigger` is how that begins and no other text does, so that a grammar may let a
    model write what it likes until there; "" where nothing does.
    """

    begin: str
    middle: str
    end: str
    quoted: bool = True
    separator: str = ""
    first: str = ""
    last: str = ""
    trigger: str = ""
    number: str = ""

    def spelt(self, name: str) -> str:
        """A function's name as it stands in a call."""
        return json.dumps(name, ensure_ascii=False) if self.quoted else name


@dataclass(frozen=True)
class TaggedFormat:
    """How a model writes a call whose arguments are texts between tags.

    It is begin, the function's name, name_end, then of each argument key, its name, value, its text, value_end; then
    arguments_end and end. All calls begin with `trigger`. Grammars that hold a call which the model begins by itself
    are made of it.
    """

    begin: str
    name_end: str
    key: str
    value: str
    value_end: str
    arguments_end: str
    end: str
    trigger: str


class ToolParser(TextReader[Piece]):
    """Reads one answer: what `feed` and `finish` return, in order, is the answer.

    Nothing is closed by guess: a call whose text
    breaks off is emitted as far as it goes, and marked. What looked like a call and shows itself to be none before its
    arguments begin stays content; what goes wrong later ends the call, marked, and the text goes on as content.

    White space next to a call belongs to the call's layout and is dropped.
    """

    # Whether its marks may be special tokens, which detokenization would hide.
    needs_special_tokens: ClassVar[bool] = False
    # How to make a model write calls in its own way; None: a JSON list of calls is asked of it instead.
    call_format: ClassVar[CallFormat | None] = None
    # The same of calls that are not JSON. A call that is forced is asked for as JSON, for which schemas say more.
    tagged_format: ClassVar[TaggedFormat | None] = None

    def __init__(self, tools: Sequence[dict[str, Any]] | None = None) -> None:
        """tools: the request's, each {"type": "function", "function": {"name", "parameters", …}}."""
        super().__init__()
        self._parameters = {
            tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools or ()
        }
        self._num_calls = 0
        self._open = False  # a call has begun and not ended
        self._named: tuple[str, str | None] | None = None  # (name, id) of a call that is about to begin
        self._held = ""  # white space that belongs to the content, or to the layout of a call that follows

    def make_id(self) -> str:
        """The id of a call that the model gave none."""
        return f"chatcmpl-tool-{uuid.uuid4().hex}"

    def parse(self, text: str) -> Answer:
        """A whole text at once."""
        return Answer.of([*self.feed(text), *self.finish()])

    def _at_end(self) -> None:
        if self._held and not self._num_calls:
            self._emit_content(self._held)

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
        self._found.append(CallStart(self._num_calls, *self._named))
        self._named = None
        self._num_calls += 1
        self._open = True
        self.source.unmark()

    def arguments(self, text: str) -> None:
        if text:
            self._found.append(CallArguments(self._num_calls - 1, text))

    def end(self, *, complete: bool = True) -> None:
        self._found.append(CallEnd(self._num_calls - 1, complete))
        self._open = False
        self.source.mark()  # what follows is content if it is not another call

    def json_arguments(self) -> Reading[None]:
        """Read the arguments of the call that was named, a JSON object: with it the call begins and ends.

        Raises:
            Malformed: there is none, or it goes wrong.
        """
        if (yield from self.source.peek()) != "{":
            raise Malformed
        self.begin()
        yield from json_value(self.source, self.arguments)
        self.end()

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

    def attempt_at_beginning(self, opening: str, call: Reading[None]) -> Reading[None]:
        """Read calls that have no mark of their own: only where an answer begins, and with this character."""
        spaces = yield from self.source.spaces()
        if (yield from self.source.peek()) == opening:
            yield from self.attempt(call, before=spaces)
        else:
            self.content(spaces)

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
        parameters = self._parameters.get(function, {})
        properties = parameters.get("properties")
        found = properties.get(parameter) if isinstance(properties, dict) else None
        return dereferenced(found, parameters) if isinstance(found, dict) else None

    def _emit_content(self, text: str) -> None:
        self._held = ""
        self._found.append(Content(text))


def dereferenced(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """What a schema stands for that refers to one of the document's definitions."""
    for _ in range(_MAX_REFERENCES):
        kind, _, name = str(schema.get("$ref", "")).removeprefix("#/").partition("/")
        definitions = document.get(kind) if kind in ("$defs", "definitions") else None
        found = definitions.get(name) if isinstance(definitions, dict) else None
        if not isinstance(found, dict):
            break
        schema = found
    return schema


def _is_text(text: str) -> bool:
    """JSON and Python can spell half a surrogate pair, which no answer can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
