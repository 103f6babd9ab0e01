"""The engine of formats that write arguments as tagged text: each becomes JSON of the type its schema names."""

from __future__ import annotations

import json
from typing import Any

from minivllm.tool_parsers.abstract import ToolParser


class TaggedToolParser(ToolParser):
    """Arguments go out one by one, each when its text is whole: only then its type is known to fit."""

    def open_call(self, name: str) -> None:
        self.name(name)
        self._function = name
        self._num_arguments = 0

    def argument(self, name: str, text: str) -> None:
        if not self._num_arguments:
            self.begin()
        value = typed(text, self.schema_of(self._function, name))
        lead = ", " if self._num_arguments else "{"
        self._num_arguments += 1
        self.arguments(f"{lead}{_dumps(name)}: {_dumps(value)}")

    def close_call(self) -> None:
        if not self._num_arguments:
            self.begin()
        self.arguments("}" if self._num_arguments else "{}")
        self.end()


def typed(text: str, schema: dict[str, Any] | None) -> Any:
    """What a text stands for: a string, unless the schema has no string and the text is JSON."""
    types = types_of(schema)
    if "null" in types and text.strip() in ("null", "None"):
        return None
    if not types or "string" in types:
        return text
    stripped = text.strip()
    if "boolean" in types and stripped in ("True", "False"):
        return stripped == "True"
    try:
        return json.loads(stripped, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def types_of(schema: dict[str, Any] | None) -> set[str]:
    """The types a schema allows, as far as it names them; empty: anything."""
    if not schema:
        return set()
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {each for each in given if isinstance(each, str)}
    if "const" in schema:
        return {_type_of(schema["const"])}
    if isinstance(schema.get("enum"), list):
        return {_type_of(value) for value in schema["enum"]}
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            return {each for option in schema[word] if isinstance(option, dict) for each in types_of(option)}
    return set()


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "string")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
