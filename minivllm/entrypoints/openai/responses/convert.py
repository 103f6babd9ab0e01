"""A request for a response as one of chat: the same prompt, the same parameters."""

from __future__ import annotations

from typing import Any

from minivllm.entrypoints.chat_utils import check_num_parts
from minivllm.entrypoints.openai.as_chat import chat_request, string_field
from minivllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from minivllm.entrypoints.openai.responses.protocol import CallItem, Item, MessageItem, ResponsesRequest
from minivllm.exceptions import RequestError, UnsupportedError

# chat's name of a field -> this API's
NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
_SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "skip_special_tokens",
    "include_stop_str_in_output", "priority", "cache_salt", "request_id", "structured_outputs",
    "chat_template_kwargs", "vllm_xargs",
)  # fmt: skip
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def to_chat(request: ResponsesRequest, messages: list[dict[str, Any]]) -> ChatCompletionRequest:
    """messages: the conversation so far and the request's input, as `input_messages` makes them.

    Raises:
        RequestError: it has a form that chat has not; the message names the field.
    """
    fields = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    if request.instructions:
        messages = [{"role": "system", "content": request.instructions}, *messages]
    fields["messages"] = messages
    if request.max_output_tokens is not None:
        fields["max_completion_tokens"] = request.max_output_tokens
    if request.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if request.tools:
        fields["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools)]
        fields["tool_choice"] = _tool_choice(request.tool_choice)
        if request.parallel_tool_calls is False:
            fields["parallel_tool_calls"] = False
    if (request.reasoning or {}).get("effort") is not None:
        fields["reasoning_effort"] = request.reasoning["effort"]
    fields |= _text(request.text)
    if request.stream:
        fields["stream"] = True
    return chat_request(fields, NAMES)


def input_messages(given: str | list[Any]) -> list[dict[str, Any]]:
    """The input as chat's messages. An assistant's reasoning, text and calls that follow each other are one message.

    Raises:
        RequestError: an item has no form we know.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        _add(messages, item, f"input[{i}]")
    return messages


def _add(messages: list[dict[str, Any]], item: Any, place: str) -> None:
    if not isinstance(item, dict):
        raise RequestError(f"{place} must be an object", param=place)
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise RequestError(f"{place}.role must be user, assistant, system or developer", param=f"{place}.role")
        text = _content(item.get("content"), f"{place}.content")
        if role == "assistant" and (turn := _open_turn(messages)) is not None and not turn.get("content"):
            turn["content"] = text
        else:
            messages.append({"role": role, "content": text})
    elif kind == "reasoning":
        text = "".join(
            part.get("text", "") for part in item.get("content") or item.get("summary") or () if isinstance(part, dict)
        )
        messages.append({"role": "assistant", "content": "", "reasoning": text})
    elif kind == "function_call":
        function = {name: string_field(item, name, place) for name in ("name", "arguments")}
        call = {"id": string_field(item, "call_id", place), "type": "function", "function": function}
        turn = _open_turn(messages)
        if turn is None:
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        turn.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = _content(item.get("output"), f"{place}.output")
        messages.append({"role": "tool", "tool_call_id": string_field(item, "call_id", place), "content": output})
    else:
        raise UnsupportedError(f"{place}: items of type {str(kind)[:100]!r} are not supported", param=place)


def _open_turn(messages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The assistant's turn that the next item of its may still belong to."""
    return messages[-1] if messages and messages[-1]["role"] == "assistant" else None


def _content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{place} must be a string or a list of parts", param=place)
    check_num_parts(content, place)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _TEXTS:
            message = f"{place}[{i}]: parts of type {str(kind)[:100]!r} are not supported; send text"
            raise UnsupportedError(message, param=place)
        texts.append(string_field(part, _TEXTS[kind], f"{place}[{i}]"))
    return "\n".join(texts)


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    if (kind := tool.get("type")) != "function":
        raise UnsupportedError(f"{place}: tools of type {str(kind)[:100]!r} do not run here", param=place)
    function = {"name": string_field(tool, "name", place), "parameters": tool.get("parameters") or {}}
    if tool.get("description") is not None:
        function["description"] = string_field(tool, "description", place)
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _tool_choice(choice: str | dict[str, Any] | None) -> Any:
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    if choice.get("type") != "function":
        kind = str(choice.get("type"))[:100]
        raise UnsupportedError(f"tool_choice of type {kind!r} is not supported", param="tool_choice")
    return {"type": "function", "function": {"name": string_field(choice, "name", "tool_choice")}}


def _text(text: dict[str, Any] | None) -> dict[str, Any]:
    if (text or {}).get("verbosity") not in (None, "medium"):
        raise UnsupportedError("text.verbosity is not supported; leave it out", param="text.verbosity")
    format_ = (text or {}).get("format")
    if format_ is None:
        return {}
    if not isinstance(format_, dict):
        raise RequestError("text.format must be an object", param="text.format")
    if format_.get("type") != "json_schema":
        return {"response_format": {"type": format_.get("type")}}
    schema = {name: format_[name] for name in ("name", "schema", "strict", "description") if name in format_}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def output_messages(output: list[Item]) -> list[dict[str, Any]]:
    """An answer as the turn of a conversation that goes on. Reasoning stays behind, as in chat."""
    turn: dict[str, Any] = {"role": "assistant", "content": ""}
    for item in output:
        if isinstance(item, MessageItem):
            turn["content"] += "".join(part.text for part in item.content)
        elif isinstance(item, CallItem):
            function = {"name": item.name, "arguments": item.arguments}
            turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    return [turn]
