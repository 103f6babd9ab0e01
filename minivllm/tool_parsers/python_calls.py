"""The engine of formats that write calls as Python does: [f(a=1, b="x"), g()]."""

from __future__ import annotations

import json
import re

from minivllm.tool_parsers.abstract import Malformed, ToolParser
from minivllm.tool_parsers.python_literal import read_literal
from minivllm.utils.text_source import Reading

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class PythonToolParser(ToolParser):
    """Arguments go out one by one, each when its text is whole: only then it can be read."""

    def call_list(self) -> Reading[None]:
        """Read a list of calls.

        Raises:
            Malformed: it is none, or not any more.
        """
        yield from self.expect("[")
        while True:
            yield from self.source.spaces()
            yield from self._call()
            yield from self.source.spaces()
            if (yield from self.expect(",", "]")) == "]":
                return

    def _call(self) -> Reading[None]:
        name = yield from self.source.matching(lambda char: char.isalnum() or char in "_.-")
        if _NAME.fullmatch(name) is None:
            raise Malformed
        yield from self.expect("(")
        num_arguments = 0
        while True:
            yield from self.source.spaces()
            if (yield from self.source.accept(")")) is not None:
                break
            key = yield from self.source.matching(lambda char: char.isalnum() or char == "_")
            yield from self.source.spaces()
            if not key or (yield from self.source.accept("=")) is None:
                raise Malformed
            text = yield from self._expression()
            value = _json_of(text)
            if not num_arguments:
                self.name(name)
                self.begin()
            self.arguments(f"{', ' if num_arguments else '{'}{json.dumps(key)}: {value}")
            num_arguments += 1
            if (yield from self.expect(",", ")")) == ")":
                break
        if not num_arguments:
            self.name(name)
            self.begin()
        self.arguments("}" if num_arguments else "{}")
        self.end()

    def _expression(self) -> Reading[str]:
        """Read up to the comma or parenthesis that ends an argument.

        Raises:
            Malformed: brackets do not match, or the text ends.
        """
        parts: list[str] = []
        closing: list[str] = []
        while char := (yield from self.source.peek()):
            if not closing and char in ",)":
                return "".join(parts)
            if char in "\"'":
                parts.append((yield from self._string()))
                continue
            if char in _CLOSING:
                closing.append(_CLOSING[char])
            elif char in ")]}":
                if not closing or closing.pop() != char:
                    raise Malformed
            parts.append(char)
            self.source.skip(1)
        raise Malformed

    def _string(self) -> Reading[str]:
        """Read a string with its quotes, three or one on each side."""
        quote = yield from self.source.peek(3)
        quote = quote if len(quote) == 3 and len(set(quote)) == 1 else quote[0]
        self.source.skip(len(quote))
        parts = [quote]
        while True:
            text, marker = yield from self.source.until("\\", quote)
            parts.append(text)
            if marker is None:
                raise Malformed
            parts.append(marker)
            if marker == quote:
                return "".join(parts)
            escaped = yield from self.source.peek()
            parts.append(escaped)
            self.source.skip(len(escaped))


def _json_of(text: str) -> str:
    """A Python literal as JSON.

    Raises:
        Malformed: it is no literal, or JSON cannot say it.
    """
    try:
        written = json.dumps(read_literal(text), ensure_ascii=False, allow_nan=False)
        written.encode()
    except ValueError:
        raise Malformed from None
    return written
