"""Python literals, read by hand: models write them, and what they write is never given to an evaluator.

Strings, numbers, True, False, None (and JSON's true, false, null), lists, tuples and dicts with string keys.
"""

from __future__ import annotations

import re
from typing import Any

from minivllm.utils.text_source import Malformed

MAX_DEPTH = 64
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:_\d+)*)?(?:\.\d*)?(?:[eE][-+]?\d+)?", re.ASCII)
_WORD = re.compile(r"[A-Za-z]+")
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_ESCAPES = {
    "\n": "", "\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t",
    "v": "\v",
}  # fmt: skip
_HEX_LENGTHS = {"x": 2, "u": 4, "U": 8}
_OCTAL = re.compile(r"[0-7]{1,3}")


def read_literal(text: str) -> Any:
    """What a whole text stands for, in values that JSON has.

    Raises:
        Malformed: it is no literal, or nested too deep.
    """
    value, end = _value(text, _skip_space(text, 0), 0)
    if _skip_space(text, end) != len(text):
        raise Malformed
    return value


def _skip_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value at a place, and where it ends."""
    if depth > MAX_DEPTH:
        raise Malformed
    char = text[at : at + 1]
    if char in ("'", '"'):
        return _strings(text, at)
    if char == "[":
        return _items(text, at + 1, "]", depth)
    if char == "(":
        items, end = _items(text, at + 1, ")", depth)
        is_tuple = len(items) != 1 or text[: end - 1].rstrip().endswith(",")
        return (items if is_tuple else items[0]), end
    if char == "{":
        return _dict(text, at + 1, depth)
    if word := _WORD.match(text, at):
        if word[0] not in _WORDS:
            raise Malformed
        return _WORDS[word[0]], word.end()
    return _number(text, at)


def _number(text: str, at: int) -> tuple[int | float, int]:
    found = _NUMBER.match(text, at)
    digits = found[0].replace("_", "")
    try:
        if digits.lstrip("+-").isdigit():
            if re.match(r"[-+]?0\d", digits):
                raise Malformed  # 0777: Python has no such numbers any more
            return int(digits), found.end()
        value = float(digits)
    except ValueError:
        raise Malformed from None
    if value in (float("inf"), float("-inf")):
        raise Malformed  # which JSON does not have
    return value, found.end()


def _items(text: str, at: int, close: str, depth: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    while True:
        at = _skip_space(text, at)
        if text[at : at + 1] == close:
            return items, at + 1
        value, at = _value(text, at, depth + 1)
        items.append(value)
        at = _separator(text, at, close)


def _dict(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while True:
        at = _skip_space(text, at)
        if text[at : at + 1] == "}":
            return found, at + 1
        key, at = _value(text, at, depth + 1)
        at = _skip_space(text, at)
        if not isinstance(key, str) or text[at : at + 1] != ":":
            raise Malformed
        found[key], at = _value(text, _skip_space(text, at + 1), depth + 1)
        at = _separator(text, at, "}")


def _separator(text: str, at: int, close: str) -> int:
    """Over the comma behind an item; at the bracket, if that comes instead."""
    at = _skip_space(text, at)
    if text[at : at + 1] == ",":
        return at + 1
    if text[at : at + 1] != close:
        raise Malformed
    return at


def _strings(text: str, at: int) -> tuple[str, int]:
    """Strings that stand one behind the other are one."""
    parts: list[str] = []
    while text[at : at + 1] in ("'", '"'):
        part, end = _string(text, at)
        parts.append(part)
        at = _skip_space(text, end)
    return "".join(parts), end


def _string(text: str, at: int) -> tuple[str, int]:
    quote = text[at : at + 3] if text[at : at + 3] in ("'''", '"""') else text[at]
    at += len(quote)
    parts: list[str] = []
    while at < len(text):
        if text.startswith(quote, at):
            return "".join(parts), at + len(quote)
        if text[at] != "\\":
            parts.append(text[at])
            at += 1
            continue
        part, at = _escape(text, at + 1)
        parts.append(part)
    raise Malformed


def _escape(text: str, at: int) -> tuple[str, int]:
    """What stands behind a backslash. An escape that Python does not know is kept as it is."""
    char = text[at : at + 1]
    if char in _ESCAPES:
        return _ESCAPES[char], at + 1
    if octal := _OCTAL.match(text, at):
        return chr(int(octal[0], 8)), octal.end()
    if char in _HEX_LENGTHS:
        end = at + 1 + _HEX_LENGTHS[char]
        digits = text[at + 1 : end]
        if not re.fullmatch(rf"[0-9a-fA-F]{{{_HEX_LENGTHS[char]}}}", digits) or int(digits, 16) > 0x10FFFF:
            raise Malformed
        return chr(int(digits, 16)), end
    return "\\" + char, at + 1
