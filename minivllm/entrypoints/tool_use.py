"""The functions a request offers, and whether one may, must or must not be called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from minivllm.exceptions import RequestError

MAX_TOOLS = 1024
MAX_NAME_CHARS = 256


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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
