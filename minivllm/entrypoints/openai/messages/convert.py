"""Anthropic's request as one of chat: the same prompt, the same parameters."""

from __future__ import annotations

import json
from typing import Any

from minivllm.entrypoints.chat_utils import check_num_parts
from minivllm.entrypoints.openai.as_chat import chat_request, string_field
from minivllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from minivllm.entrypoints.openai.messages.protocol import CountTokensRequest, MessagesRequest
from minivllm.exceptions import RequestError, UnsupportedError

# chat's name of a field -> Anthropic's
NAMES = {
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "max_completion_tokens": "max_tokens",
}
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(request: CountTokensRequest) -> ChatCompletionRequest:
    """Raises:
    RequestError: it has a form that chat has not; the message names the field.
    """
    fields: dict[str, Any] = {"model": request.model, "messages": _messages(request)}
    if request.tools:
        fields["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools)]
    if request.tool_choice is not None:
        fields |= _tool_choice(request.tool_choice)
    kwargs = dict(request.chat_template_kwargs or {})
    fields |= _thinking(request.thinking, kwargs)
    fields |= _output_config(request.output_config)
    if kwargs:
        fields["chat_template_kwargs"] = kwargs
    if isinstance(request, MessagesRequest):
        names = ("max_tokens", "temperature", "top_k", "top_p", "cache_salt", "vllm_xargs", "kv_transfer_params")
        fields |= {name: value for name in names if (value := getattr(request, name)) is not None}
        if request.stop_sequences:
            fields["stop"] = request.stop_sequences
        if request.stream:
            fields["stream"] = True
    return chat_request(fields, NAMES)


def _messages(request: CountTokensRequest) -> list[dict[str, Any]]:
    messages = []
    if request.system:
        messages.append({"role": "system", "content": _texts(request.system, "system")})
    for i, message in enumerate(request.messages):
        place = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
            raise RequestError(f"{place} must be an object whose role is user or assistant", param=place)
        content = message.get("content")
        if isinstance(content, str):
            messages.append({"role": message["role"], "content": content})
            continue
        if not isinstance(content, list):
            raise RequestError(f"{place}.content must be a string or a list of blocks", param=f"{place}.content")
        check_num_parts(content, f"{place}.content")
        if message["role"] == "assistant":
            messages.append(_assistant(content, f"{place}.content"))
        else:
            messages += _user(message["role"], content, f"{place}.content")
    return messages


def _user(role: str, blocks: list[Any], place: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own in chat, and come before what the user says."""
    results, parts = [], []
    for i, block in enumerate(blocks):
        where = f"{place}[{i}]"
        kind = _kind(block, where)
        if kind == "text":
            parts.append({"type": "text", "text": string_field(block, "text", where)})
        elif kind == "tool_result":
            content = block.get("content")
            text = "" if content is None else _texts(content, f"{where}.content")
            results.append({"role": "tool", "tool_call_id": string_field(block, "tool_use_id", where), "content": text})
        else:
            raise UnsupportedError(f"{where}: blocks of type {kind!r} are not supported; send text", param=where)
    return results + ([{"role": role, "content": parts}] if parts or not results else [])


def _assistant(blocks: list[Any], place: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        where = f"{place}[{i}]"
        kind = _kind(block, where)
        if kind == "text":
            texts.append(string_field(block, "text", where))
        elif kind == "thinking":
            thoughts.append(string_field(block, "thinking", where))
        elif kind == "tool_use":
            if not isinstance(block.get("input"), dict):
                raise RequestError(f"{where}.input must be an object", param=f"{where}.input")
            function = {"name": string_field(block, "name", where), "arguments": json.dumps(block["input"])}
            calls.append({"id": string_field(block, "id", where), "type": "function", "function": function})
        elif kind != "redacted_thinking":  # which nobody can read
            raise UnsupportedError(f"{where}: blocks of type {kind!r} are not supported", param=where)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _kind(block: Any, place: str) -> str:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise RequestError(f"{place} must be an object with a type", param=place)
    return block["type"][:100]


def _texts(content: Any, place: str) -> str:
    """A string, or the texts of a list of blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{place} must be a string or a list of blocks", param=place)
    check_num_parts(content, place)
    for i, block in enumerate(content):
        if (kind := _kind(block, f"{place}[{i}]")) != "text":
            raise UnsupportedError(f"{place}[{i}]: blocks of type {kind!r} are not supported; send text", param=place)
    return "\n".join(string_field(block, "text", f"{place}[{i}]") for i, block in enumerate(content))


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    if (kind := tool.get("type") or "custom") != "custom":
        raise UnsupportedError(f"{place}: tools of type {str(kind)[:100]!r} run at Anthropic and not here", param=place)
    function = {"name": string_field(tool, "name", place), "parameters": tool.get("input_schema") or {}}
    if tool.get("description") is not None:
        function["description"] = string_field(tool, "description", place)
    if tool.get("strict"):
        function["strict"] = True
    return {"type": "function", "function": function}


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    kind = choice.get("type")
    fields: dict[str, Any] = {}
    if kind == "tool":
        function = {"name": string_field(choice, "name", "tool_choice")}
        fields["tool_choice"] = {"type": "function", "function": function}
    elif isinstance(kind, str) and kind in _TOOL_CHOICES:
        fields["tool_choice"] = _TOOL_CHOICES[kind]
    else:
        raise RequestError("tool_choice.type must be auto, any, tool or none", param="tool_choice")
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields


def _thinking(thinking: dict[str, Any] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The fields that ask for it; what the template must know goes into `kwargs`."""
    kind = (thinking or {}).get("type", "adaptive")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise RequestError("thinking.type must be enabled, disabled or adaptive", param="thinking.type")
    if kind != "adaptive":
        kwargs.setdefault("enable_thinking", kind == "enabled")
    return {"thinking_token_budget": thinking["budget_tokens"]} if kind == "enabled" else {}


def _output_config(config: dict[str, Any] | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if (config or {}).get("effort") is not None:
        fields["reasoning_effort"] = config["effort"]
    if (format_ := (config or {}).get("format")) is not None:
        if not isinstance(format_, dict) or format_.get("type") != "json_schema":
            raise RequestError("output_config.format.type must be json_schema", param="output_config.format")
        schema = {"name": "output", "schema": format_.get("schema") or {}, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields
