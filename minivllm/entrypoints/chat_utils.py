"""OpenAI's list of messages, checked and made plain: what a chat template is rendered from.

Owns the forms a message may have. Knows nothing of templates or tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minivllm.exceptions import RequestError, UnsupportedError

ROLES = ("system", "developer", "user", "assistant")
_LATER_ROLES = ("tool", "function")
_LATER_FIELDS = ("tool_calls", "function_call", "tool_call_id", "audio")
# What a template may look at beside role and content; reasoning_content is how older clients spell reasoning.
_PASSED_ON = ("name", "reasoning", "reasoning_content")


def parse_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with a role and a text; parts of type text are joined by line breaks, as vLLM joins them.

    Raises:
        RequestError: a message has no such form; the error names it by its index.
        UnsupportedError: it holds what is not supported yet (images, audio, tool calls, …).
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise _wrong("messages must be a list of messages", "messages")
    if not messages:
        raise _wrong("messages is empty; it needs at least one message", "messages")
    return [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def is_conversation(messages: Any) -> bool:
    """Whether this is one list of messages rather than a list of such lists."""
    return not (isinstance(messages, Sequence) and messages and isinstance(messages[0], Sequence))


def _parse_message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(f"{place} must be an object with role and content, not {type(message).__name__}", place)
    role = message.get("role")
    if role in _LATER_ROLES:
        raise UnsupportedError(f"{place}.role {role!r} is not supported yet", param=f"{place}.role")
    if role not in ROLES:
        raise _wrong(f"{place}.role is {role!r}; it must be one of {', '.join(ROLES)}", f"{place}.role")
    for field in _LATER_FIELDS:
        if message.get(field):
            raise UnsupportedError(f"{place}.{field} is not supported yet", param=f"{place}.{field}")
    parsed = {"role": role, "content": _text(message.get("content"), role, f"{place}.content")}
    for field in _PASSED_ON:
        value = message.get(field)
        if value is not None and not isinstance(value, str):
            raise _wrong(f"{place}.{field} must be a string, not {type(value).__name__}", f"{place}.{field}")
        if value is not None:
            parsed[field] = value
    return parsed


def _text(content: Any, role: str, place: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""  # an assistant's turn that was all refusal or calls
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        kind = "missing" if content is None else f"a {type(content).__name__}"
        raise _wrong(f"{place} is {kind}; it must be a string or a list of parts", place)
    return "\n".join(_part_text(part, f"{place}[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise _wrong(f"{place} must be an object with a type, not {type(part).__name__}", place)
    kind = part.get("type", "text")
    if kind not in ("text", "refusal"):
        raise UnsupportedError(f"{place}: parts of type {kind!r} are not supported yet; send text", param=place)
    text = part.get(kind)
    if not isinstance(text, str):
        raise _wrong(f"{place}.{kind} must be a string, not {type(text).__name__}", f"{place}.{kind}")
    return text


def _wrong(message: str, param: str) -> RequestError:
    return RequestError(message, param=param)
