"""The functions a request offers, and whether one may, must or must not be called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from minivllm.exceptions import RequestError
from minivllm.sampling_params import StructuredOutputsParams
from minivllm.tool_parsers.abstract import CallFormat, TaggedFormat, dereferenced
from minivllm.tool_parsers.xml_calls import types_of

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
    return _form(_free_text_with(tags, written.trigger, only_one=not use.parallel))


def form_of_free_tagged_calls(use: ToolUse, written: TaggedFormat, *, all_strict: bool) -> StructuredOutputsParams:
    """The same of calls whose arguments are tagged texts. A strict function's are those that its schema names, in that
    order: JSON of their schemas; texts that may be strings are any, or those of an enum."""
    tags = [_tagged_call(written, tool, is_held=all_strict or is_strict(tool)) for tool in use.tools]
    return _form(_free_text_with(tags, written.trigger, only_one=not use.parallel))


def _free_text_with(tags: list[dict[str, Any]], trigger: str, *, only_one: bool) -> dict[str, Any]:
    return {
        "type": "triggered_tags",
        "triggers": [trigger],
        "tags": tags,
        "at_least_one": False,
        "stop_after_first": only_one,
    }


def _tag(written: CallFormat, tool: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    begin = written.begin + written.spelt(tool["function"]["name"])
    content = {"type": "json_schema", "json_schema": arguments}
    if written.number:
        number = {"type": "regex", "pattern": written.number}
        content = _sequence([number, _const(written.middle), content])
    else:
        begin += written.middle
    return {"type": "tag", "begin": begin, "content": content, "end": written.end}


def _tagged_call(written: TaggedFormat, tool: dict[str, Any], *, is_held: bool) -> dict[str, Any]:
    begin = written.begin + tool["function"]["name"] + written.name_end
    schema = _arguments_schema(tool)
    properties = schema.get("properties")
    if not is_held or not isinstance(properties, dict):
        # A mark that ends them may be a special token, which only the first part of a trigger can be.
        if written.arguments_end:
            return {"type": "tag", "begin": begin, "content": _text_until(written.arguments_end), "end": written.end}
        return {"type": "tag", "begin": begin, "content": _text_until(written.end), "end": ""}
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    required = schema.get("required") or ()
    arguments = []
    for name, given in properties.items():
        argument = _tagged_argument(written, name, given if isinstance(given, dict) else {}, shared)
        arguments.append(argument if name in required else _either([_const(""), argument]))
    return {
        "type": "tag",
        "begin": begin,
        "content": _sequence([*arguments, _const(written.arguments_end)]),
        "end": written.end,
    }


def _tagged_argument(
    written: TaggedFormat, name: str, schema: dict[str, Any], shared: dict[str, Any]
) -> dict[str, Any]:
    """shared: what the schema may refer to."""
    begin = _const(written.key + name + written.value)
    meant = dereferenced(schema, shared)
    texts = [meant["const"]] if "const" in meant else meant.get("enum")
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return _sequence([begin, _either([_const(text) for text in texts]), _const(written.value_end)])
    types = types_of(meant)
    if not types or "string" in types:  # which is how the parser reads it, too
        return _sequence([begin, _text_until(written.value_end)])
    value = {"type": "json_schema", "json_schema": {**shared, **schema}}
    return _sequence([begin, value, _const(written.value_end)])


def _const(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


def _sequence(elements: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "sequence", "elements": elements}


def _either(elements: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "or", "elements": elements}


def _text_until(mark: str) -> dict[str, Any]:
    """Any text up to a mark, and the mark."""
    tag = {"begin": mark, "content": _const(""), "end": ""}
    return {
        "type": "triggered_tags", "triggers": [mark], "tags": [tag], "at_least_one": True, "stop_after_first": True,
    }  # fmt: skip


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
