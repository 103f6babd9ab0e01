"""From what a request asks of its answer's form to one grammar that llguidance compiles.

Pure functions. The text that comes out says everything: the engine core compiles it and knows no kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from minivllm.sampling_params import StructuredOutputsParams

_HEADER = "%llguidance {}\n"
_FREE_TEXT = r"FREE_TEXT: /(.|\n)*/"


class GrammarError(Exception):
    """The constraint cannot be made a grammar; the message says which part of it."""


def to_grammar(params: StructuredOutputsParams, special_ids: Mapping[str, int]) -> str:
    """The grammar. special_ids: special tokens by their text; in structural tags they stand for themselves.

    Raises:
        GrammarError: it is not what it should be, as far as can be seen without compiling it.
    """
    options = _json_options(params)
    if params.json is not None:
        return _json_grammar(json.loads(params.json), params, options)
    if params.json_object is not None:
        return _json_grammar({"type": "object"}, params, options)
    if params.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return f"{_HEADER}start: " + " | ".join(map(_literal, params.choice))
    if params.grammar is not None:
        return _read_grammar(params.grammar)
    return _StructuralTag(params, options, special_ids).grammar(json.loads(params.structural_tag))


def _read_grammar(text: str) -> str:
    try:
        return any_to_lark(text)
    except (Exception, RecursionError) as error:
        raise GrammarError(f"grammar: cannot read it: {error}") from None


# JSON


def _json_options(params: StructuredOutputsParams) -> dict[str, Any]:
    """What llguidance's JSON compiler is told; a keyword it lacks is always an error, never overlooked."""
    options: dict[str, Any] = {"lenient": False}
    if params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return options


def _json_grammar(schema: Any, params: StructuredOutputsParams, options: dict[str, Any]) -> str:
    prepared = _prepared(schema, params, options)
    return json.dumps({"grammars": [{"json_schema": prepared}]}, ensure_ascii=False)


def _prepared(schema: Any, params: StructuredOutputsParams, options: dict[str, Any]) -> Any:
    """The schema with the request's options in it. Its order is kept: properties come in it."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise GrammarError(f"a schema must be a JSON object, got {type(schema).__name__}")
    if params.disable_additional_properties:
        schema = _closed(schema)
    own = schema.get("x-guidance")
    return schema | {"x-guidance": (own if isinstance(own, dict) else {}) | options}


_HOLD_VALUES = frozenset(("const", "default", "enum", "examples"))  # keywords whose value is data, no schema
_HOLD_SCHEMAS_BY_NAME = frozenset(("$defs", "definitions", "dependentSchemas", "patternProperties", "properties"))


def _closed(schema: Any) -> Any:
    """The schema with no further properties allowed wherever it lists some and does not say."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in _HOLD_VALUES:
            closed[keyword] = value
        elif keyword in _HOLD_SCHEMAS_BY_NAME and isinstance(value, dict):
            closed[keyword] = {name: _closed(each) for name, each in value.items()}
        else:
            closed[keyword] = _closed(value)
    if "properties" in schema or "patternProperties" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


# Lark


def _literal(text: str) -> str:
    """A text as Lark spells it."""
    return json.dumps(text, ensure_ascii=False)


class _StructuralTag:
    """Text with parts that are constrained: the form with `structures` and `triggers`, and that with a `format`."""

    def __init__(
        self, params: StructuredOutputsParams, options: dict[str, Any], special_ids: Mapping[str, int]
    ) -> None:
        self._params = params
        self._options = options
        # Longest first, so that none hides another that begins like it.
        self._special_ids = dict(sorted(special_ids.items(), key=lambda item: -len(item[0])))
        self._rules: list[str] = []
        self._makers: dict[str, Callable[[dict[str, Any]], str]] = {
            "const_string": self._const_string,
            "json_schema": self._json_schema,
            "regex": self._regex,
            "or": self._or,
            "sequence": self._sequence,
            "tag": self._tag,
            "tags_with_separator": self._tags_with_separator,
            "triggered_tags": self._triggered_tags,
        }

    def grammar(self, tag: dict[str, Any]) -> str:
        if tag.get("type", "structural_tag") != "structural_tag":
            raise GrammarError(f"structural_tag: type must be structural_tag, got {tag['type']!r:.80}")
        if "format" in tag:
            start = self._expression(tag["format"])
        else:
            start = self._triggered_tags(
                {
                    "triggers": tag.get("triggers"),
                    "tags": [
                        {
                            "begin": each.get("begin"),
                            "content": {"type": "json_schema", "json_schema": each.get("schema", {})},
                            "end": each.get("end", ""),
                        }
                        for each in _objects(tag, "structures")
                    ],
                }
            )
        return "\n".join([f"{_HEADER}start: {start}", *self._rules])

    def _expression(self, format: Any) -> str:
        if not isinstance(format, dict) or not isinstance(format.get("type"), str):
            raise GrammarError("structural_tag: a format must be a JSON object with a type")
        make = self._makers.get(format["type"])
        if make is None:
            raise GrammarError(
                f"structural_tag: the format {format['type']!r:.80} is not supported; "
                f"use one of {', '.join(self._makers)}"
            )
        return make(format)

    def _rule(self, body: str, *, lazy: bool = False) -> str:
        """A new rule; its name."""
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def _text(self, text: Any, name: str) -> str:
        """A text's literals and special tokens."""
        if not isinstance(text, str):
            raise GrammarError(f"structural_tag: {name} must be a string")
        for special, token_id in self._special_ids.items():
            before, found, after = text.partition(special)
            if found:
                parts = (self._text(before, name), f"<[{token_id}]>", self._text(after, name))
                return " ".join(part for part in parts if part)
        return _literal(text) if text else ""

    def _const_string(self, format: dict[str, Any]) -> str:
        return self._text(format.get("value"), "value") or '""'

    def _json_schema(self, format: dict[str, Any]) -> str:
        prepared = _prepared(format.get("json_schema", {}), self._params, self._options)
        return self._rule("%json " + json.dumps(prepared, ensure_ascii=False))

    def _regex(self, format: dict[str, Any]) -> str:
        if not isinstance(format.get("pattern"), str):
            raise GrammarError("structural_tag: pattern must be a string")
        return self._rule(f"/{llguidance.regex_to_lark(format['pattern'])}/")

    def _or(self, format: dict[str, Any]) -> str:
        return self._rule(" | ".join(self._expression(each) for each in _objects(format, "elements")))

    def _sequence(self, format: dict[str, Any]) -> str:
        return self._rule(" ".join(self._expression(each) for each in _objects(format, "elements")))

    def _tag(self, format: dict[str, Any]) -> str:
        return self._rule(f"{self._text(format.get('begin'), 'begin')} {self._rest(format)}")

    def _rest(self, tag: dict[str, Any]) -> str:
        """What follows a tag's beginning."""
        return f"{self._expression(tag.get('content'))} {self._text(tag.get('end', ''), 'end')}"

    def _tags_with_separator(self, format: dict[str, Any]) -> str:
        tag = self._rule(" | ".join(self._tag(each) for each in _objects(format, "tags")))
        separator = self._text(format.get("separator", ""), "separator")
        if format.get("stop_after_first"):
            return self._rule(tag if format.get("at_least_one") else f"{tag}?")
        tags = f"{tag} ({separator} {tag})*"
        return self._rule(tags if format.get("at_least_one") else f"({tags})?")

    def _triggered_tags(self, format: dict[str, Any]) -> str:
        """Free text; where a trigger appears in it, a tag that begins with it must follow."""
        triggers = format.get("triggers")
        if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
            raise GrammarError("structural_tag: triggers must be a list of strings that are not empty")
        tag = self._rule(" | ".join(self._triggered(each, triggers) for each in _objects(format, "tags")))
        if _FREE_TEXT not in self._rules:
            self._rules.append(_FREE_TEXT)
        if format.get("stop_after_first"):
            return self._rule(tag if format.get("at_least_one") else f"{tag} | FREE_TEXT")
        return self._rule(f"{tag}{'+' if format.get('at_least_one') else '*'} FREE_TEXT")

    def _triggered(self, tag: dict[str, Any], triggers: list[str]) -> str:
        begin = tag.get("begin")
        trigger = next((t for t in triggers if isinstance(begin, str) and begin.startswith(t)), None)
        if trigger is None:
            raise GrammarError(f"structural_tag: begin {begin!r:.80} starts with none of the triggers")
        head = self._text(trigger, "triggers")
        if any(trigger.startswith(special) for special in self._special_ids):
            start = f"FREE_TEXT {head}"
        elif any(special in trigger for special in self._special_ids):
            raise GrammarError(f"structural_tag: the trigger {trigger!r:.80} must begin with its special token")
        else:
            start = self._rule(f"FREE_TEXT {head}", lazy=True)
        return self._rule(f"{start} {self._text(begin[len(trigger) :], 'begin')} {self._rest(tag)}")


def _objects(format: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = format.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise GrammarError(f"structural_tag: {name} must be a list of JSON objects that is not empty")
    return found
