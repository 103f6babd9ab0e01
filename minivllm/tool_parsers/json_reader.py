"""JSON read as it is written: validated character by character, handed on as far as it is right.

Owns the grammar of JSON (RFC 8259). Knows nothing of calls.
"""

from __future__ import annotations

import json
import re

from minivllm.utils.text_source import Emit, Malformed, Reading, TextSource

MAX_DEPTH = 512  # what json.loads of any client can still read
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII)
_NUMBER_CHARS = frozenset("-+.eE0123456789")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # of a string: what needs no second look
_SPACE = frozenset(" \t\n\r")
_HEX = frozenset("0123456789abcdefABCDEF")


class JsonScanner:
    """Follows one JSON value character by character. `done` when it is closed, `broken` when it cannot be any more.

    A number has no end of its own: one that is the whole value is never done.
    """

    def __init__(self) -> None:
        self.done = self.broken = False
        self._stack: list[str] = []  # open brackets
        self._state = "value"
        self._word = ""  # of a number: its characters; of a literal: those to come
        self._num_hex = 0

    def scan(self, text: str, pos: int, out: list[str]) -> int:
        """Go on at `pos`; returns where it stopped: the text's end, behind the value, or before what is wrong.

        What was scanned goes to `out`; line breaks and the like inside strings, which models write and JSON forbids,
        go there escaped.
        """
        begin = pos
        while pos < len(text) and not self.done and not self.broken:
            if self._state == "string":
                plain = _PLAIN.match(text, pos).end()
                if plain > pos:
                    pos = plain
                    continue
                if text[pos] < " ":
                    out.append(text[begin:pos])
                    out.append(json.dumps(text[pos])[1:-1])
                    pos = begin = pos + 1
                    continue
            if self._step(text[pos]):
                pos += 1
        out.append(text[begin:pos])
        return pos

    def _step(self, char: str) -> bool:
        """Take one character; False when it was not taken: it is wrong, or ends a number and is to be seen again."""
        return getattr(self, f"_in_{self._state}")(char)

    def _wrong(self) -> bool:
        self.broken = True
        return False

    def _in_value(self, char: str) -> bool:
        if char in _SPACE:
            return True
        if char in "{[":
            if len(self._stack) == MAX_DEPTH:
                return self._wrong()
            self._stack.append(char)
            self._state = "first_key" if char == "{" else "first_item"
        elif char == '"':
            self._state = "string"
        elif char == "-" or char in _NUMBER_CHARS and char.isdigit():
            self._state, self._word = "number", char
        elif char in _LITERALS:
            self._state, self._word = "literal", _LITERALS[char][1:]
        else:
            return self._wrong()
        return True

    def _in_first_item(self, char: str) -> bool:
        if char == "]":
            return self._close("[")
        return self._in_value(char)

    def _in_first_key(self, char: str) -> bool:
        if char == "}":
            return self._close("{")
        return self._in_key(char)

    def _in_key(self, char: str) -> bool:
        if char == '"':
            self._state = "string"
            self._stack.append('"')  # a string that is a key
            return True
        return char in _SPACE or self._wrong()

    def _in_colon(self, char: str) -> bool:
        if char == ":":
            self._state = "value"
            return True
        return char in _SPACE or self._wrong()

    def _in_after(self, char: str) -> bool:
        """Behind a value in a list or an object."""
        if char in _SPACE:
            return True
        if char == ",":
            self._state = "key" if self._stack[-1] == "{" else "value"
            return True
        return self._close("{" if char == "}" else "[") if char in "}]" else self._wrong()

    def _close(self, opened: str) -> bool:
        if self._stack[-1] != opened:
            return self._wrong()
        self._stack.pop()
        return self._value_over()

    def _value_over(self) -> bool:
        self._state = "after"
        self.done = not self._stack
        return True

    def _in_string(self, char: str) -> bool:
        if char == "\\":
            self._state = "escape"
            return True
        # A quote: `scan` takes all other characters.
        if self._stack and self._stack[-1] == '"':
            self._stack.pop()
            self._state = "colon"
            return True
        return self._value_over()

    def _in_escape(self, char: str) -> bool:
        if char == "u":
            self._state, self._num_hex = "hex", 4
            return True
        if char in '"\\/bfnrt':
            self._state = "string"
            return True
        return self._wrong()

    def _in_hex(self, char: str) -> bool:
        if char not in _HEX:
            return self._wrong()
        self._num_hex -= 1
        if not self._num_hex:
            self._state = "string"
        return True

    def _in_number(self, char: str) -> bool:
        if char in _NUMBER_CHARS:
            self._word += char
            return True
        if _NUMBER.fullmatch(self._word) is None:
            return self._wrong()
        self._value_over()
        return False

    def _in_literal(self, char: str) -> bool:
        if char != self._word[0]:
            return self._wrong()
        self._word = self._word[1:]
        return self._value_over() if not self._word else True


def json_value(source: TextSource, emit: Emit) -> Reading[None]:
    """Read one JSON value; its text goes to `emit` as it comes.

    Raises:
        Malformed: it is wrong, or the text ends within it; what came before that was emitted.
    """
    scanner = JsonScanner()
    while not scanner.done:
        text, out = source.unread, []
        source.skip(scanner.scan(text, 0, out))
        if found := "".join(out):
            emit(found)
        if scanner.done:
            return
        if scanner.broken:
            raise Malformed
        if source.ended:
            raise Malformed
        yield


def json_string(source: TextSource) -> Reading[str]:
    """Read a JSON string: what it says.

    Raises:
        Malformed: there is none, or the text ends within it.
    """
    if (yield from source.peek()) != '"':
        raise Malformed
    parts: list[str] = []
    yield from json_value(source, parts.append)
    return json.loads("".join(parts))
