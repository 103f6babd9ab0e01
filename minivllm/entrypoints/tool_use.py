"""The functions a request offers, and whether one may, must or must not be called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from minivllm.exceptions import RequestError
from minivllm.sampling_params import StructuredOutputsParams
from minivllm.tool_parsers.abstract import CallFormat

MAX_TOOLS = 1024
MAX_NAME_CHARS = 256
JSON_LIST = CallFormat('{"name": ', ', "parameters": ', "}", separator=", ", first="[", last="]")


@dataclass(frozen=True)
class ToolUse:
    """What of tools concerns one answer. `name` is the function's, with choice "named"."""

    tools: list[dict[str, Any]]
    choice: Literal["none", "auto", "required", "named"] = "none"
    name: str | None = None
    parallel: bool = True

    @property
    def may_call(self) -> bool:
        return self.choice != "none"

    @property
    def must_call(self) -> bool:
        return self.choice in ("required", "named")

    @property
    def asks_for_strict(self) -> bool:
        """A function says `strict`: its arguments are to match its schema also where nobody forces a call."""
        return any(is_strict(tool) for tool in self.tools)

    @property
    def callable(self) -> list[dict[str, Any]]:
        """The functions that may be called."""
        if self.choice == "named":
            return [tool for tool in self.tools if tool["function"]["name"] == self.name][:1]
        return self.tools


NO_TOOLS = ToolUse([])


def read_tool_use(tools: Any, tool_choice: Any, parallel_tool_calls: bool | None = True) -> ToolUse:
    """Check a request's tools and what it says of their use.

    Raises:
        RequestError: something is wrong; `param` is its path.
    """
    if tools is None:
        if tool_choice not in (None, "none"):
            raise RequestError(f"tool_choice={_shown(tool_choice)} needs tools to choose from", param="tool_choice")
        return NO_TOOLS
    check_tools(tools)
    choice, name = _read_choice(tools, "auto" if tool_choice is None else tool_choice)
    return ToolUse(tools, choice, name, parallel=parallel_tool_calls is not False)


def check_tools(tools: Any, place: str = "tools") -> None:
    """Raises RequestError, with the path of what is wrong, unless these are functions with names and JSON schemas."""
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise RequestError(f"{place} must be a list of 1 to {MAX_TOOLS} tools; leave it out to offer none", param=place)
    for i, tool in enumerate(tools):
        _check_tool(tool, f"{place}[{i}]")


def _check_tool(tool: Any, place: str) -> None:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        raise RequestError(f'{place} must be an object of type "function"', param=place)
    function = tool.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{place}.function must be an object with a name", param=f"{place}.function")
    name = function.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise RequestError(
            f"{place}.function.name must be a string of 1 to {MAX_NAME_CHARS} printable characters, got {_shown(name)}",
            param=f"{place}.function.name",
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise RequestError(
            f"{place}.function.description must be a string", param=f"{place}.function.description"
        )
    if function.get("parameters") is not None:
        _check_schema(function["parameters"], f"{place}.function.parameters")


def _check_schema(schema: Any, place: str) -> None:
    if not isinstance(schema, dict):
        raise RequestError(f"{place} must be a JSON schema, an object, got {_shown(schema)}", param=place)
    if schema.get("type", "object") != "object":
        raise RequestError(
            f'{place}.type must be "object", for arguments have names; got {_shown(schema["type"])}',
            param=f"{place}.type",
        )
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        json.dumps(schema, allow_nan=False).encode()
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        path = place + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        raise RequestError(f"{path} is not valid JSON Schema: {error.message[:200]}", param=path) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place} is not valid JSON Schema: {error}"[:300], param=place) from None


def _read_choice(tools: list[dict[str, Any]], choice: Any) -> tuple[Any, str | None]:
    if choice in ("none", "auto", "required"):
        return choice, None
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError(
            "tool_choice must be none, auto, required or "
            f'{{"type": "function", "function": {{"name": …}}}}, got {_shown(choice)}',
            param="tool_choice",
        )
    if not any(tool["function"]["name"] == name for tool in tools):
        names = ", ".join(tool["function"]["name"] for tool in tools[:10])
        raise RequestError(f"tool_choice names {_shown(name)}, which is not in tools: {names}", param="tool_choice")
    return "named", name


def as_prompted(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as a chat template is to show it: its fields in the order in which models were shown them, whatever order
    a client sent, and without a `strict` that asks for nothing."""
    function = tool["function"]
    ordered = {name: function[name] for name in ("name", "description", "parameters") if name in function}
    ordered |= {name: value for name, value in function.items() if (name, value) != ("strict", False)}
    return {"type": "function", **tool, "function": ordered}


def is_strict(tool: dict[str, Any]) -> bool:
    return tool["function"].get("strict") is True


def form_of_calls(use: ToolUse, written: CallFormat | None) -> StructuredOutputsParams:
    """The form of an answer that must call: as the model writes calls, or, where that is not known, as JSON.

    As JSON it is a list of {"name", "parameters"}; of a function that was named, its arguments alone.
    """
    if written is None and use.choice == "named":
        return StructuredOutputsParams(json=_arguments_schema(use.callable[0]), param="tools")
    written = written or JSON_LIST
    tags = [_tag(written, tool, _arguments_schema(tool)) for tool in use.callable]
    calls = _one_or_more(written, tags, only_one=use.choice == "named" or not use.parallel)
    first, last = ([{"type": "const_string", "value": text}] if text else [] for text in (written.first, written.last))
    return _form({"type": "sequence", "elements": [*first, calls, *last]})


def form_of_free_calls(use: ToolUse, written: CallFormat, *, all_strict: bool) -> StructuredOutputsParams:
    """The form of an answer that may call: any text, but what begins as a call is one, of a function there is. Its
    arguments match its schema if it is strict, or all are; else they are some object."""
    tags = [
        _tag(written, tool, _arguments_schema(tool) if all_strict or is_strict(tool) else {"type": "object"})
        for tool in use.tools
    ]
    if written.first:  # all calls stand together, and may come again
        calls = _one_or_more(written, tags, only_one=not use.parallel)
        tags = [{"type": "tag", "begin": written.first, "content": calls, "end": written.last}]
    return _form(
        {
            "type": "triggered_tags",
            "triggers": [written.trigger],
            "tags": tags,
            "at_least_one": False,
            "stop_after_first": not use.parallel,
        }
    )


def _tag(written: CallFormat, tool: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "tag",
        "begin": written.begin + written.spelt(tool["function"]["name"]) + written.middle,
        "content": {"type": "json_schema", "json_schema": arguments},
        "end": written.end,
    }


def _one_or_more(written: CallFormat, tags: list[dict[str, Any]], *, only_one: bool) -> dict[str, Any]:
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": written.separator,
        "at_least_one": True,
        "stop_after_first": only_one,
    }


def _form(format: dict[str, Any]) -> StructuredOutputsParams:
    return StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": format}, param="tools")


def _arguments_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """A function without parameters takes no arguments."""
    given = tool["function"].get("parameters")
    if given is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **given}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
