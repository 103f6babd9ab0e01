"""OpenAI's list of messages, checked and made plain: what a chat template is rendered from.

Owns the forms a message may have. Knows nothing of templates or tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from minivllm.exceptions import RequestError, UnsupportedError

ROLES = ("system", "developer", "user", "assistant", "tool")
_NOT_HERE = ("function_call", "audio")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA_PARTS = {
    "image_url": "images", "input_image": "images", "image_embeds": "images", "image_pil": "images",
    "input_audio": "audio", "audio_url": "audio", "audio_embeds": "audio", "video_url": "videos", "file": "files",
    "input_file": "files",
}  # fmt: skip

MAX_PARTS = 16_384  # of one message

ContentFormat = Literal["string", "openai"]


# What the server gives to the template itself, or the library's function takes for its own; a request may not.
RESERVED_TEMPLATE_KWARGS = frozenset(
    (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_chars",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
        "trusted",
    )
)


def parse_messages(
    messages: Sequence[dict[str, Any]], content_format: ContentFormat = "string", *, template: str | None = None
) -> list[dict[str, Any]]:
    """Messages as templates take them.

    template: the one they are for. If it does not know the role "developer", it gets "system", which is what older
    models call it.

    content_format: "string": parts of type text are joined by line breaks, as vLLM joins them; "openai": every content
    is a list of {"type": "text", "text"}. Arguments of tool calls become objects, which is what templates write out.

    Raises:
        RequestError: a message has no such form; the error names it by its index.
        UnsupportedError: it holds what is not supported (images, audio, …).
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise _wrong("messages must be a list of messages", "messages")
    if not messages:
        raise _wrong("messages is empty; it needs at least one message", "messages")
    parsed = [_parse_message(message, f"messages[{i}]", content_format) for i, message in enumerate(messages)]
    if template is not None and "developer" not in template:
        for message in parsed:
            if message["role"] == "developer":
                message["role"] = "system"
    return parsed


def is_conversation(messages: Any) -> bool:
    """Whether this is one list of messages rather than a list of such lists."""
    return not (isinstance(messages, Sequence) and messages and isinstance(messages[0], Sequence))


def text_of(message: dict[str, Any], place: str) -> str:
    """A message's content as one string.

    Raises:
        RequestError: it has another form.
    """
    return "\n".join(_texts(message.get("content"), message.get("role"), f"{place}.content"))


def _parse_message(message: Any, place: str, content_format: ContentFormat) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(f"{place} must be an object with role and content, not {type(message).__name__}", place)
    role = message.get("role")
    if role not in ROLES:
        raise _wrong(f"{place}.role is {role!r}; it must be one of {', '.join(ROLES)}", f"{place}.role")
    for field in _NOT_HERE:
        if message.get(field):
            raise UnsupportedError(f"{place}.{field} is not supported; leave it out", param=f"{place}.{field}")
    texts = _texts(message.get("content"), role, f"{place}.content")
    content = [{"type": "text", "text": text} for text in texts] if content_format == "openai" else "\n".join(texts)
    parsed = {"role": role, "content": content}
    if (name := _string(message, "name", place)) is not None:
        parsed["name"] = name
    if role == "tool" and (id := _string(message, "tool_call_id", place)) is not None:
        parsed["tool_call_id"] = id
    if role == "assistant":
        reasoning = _string(message, "reasoning", place)
        reasoning = _string(message, "reasoning_content", place) if reasoning is None else reasoning
        if reasoning is not None:  # templates know it by either name
            parsed["reasoning"] = parsed["reasoning_content"] = reasoning
        if message.get("tool_calls"):
            parsed["tool_calls"] = _tool_calls(message["tool_calls"], f"{place}.tool_calls")
    elif message.get("tool_calls"):
        raise _wrong(f"{place}.tool_calls: only an assistant calls tools", f"{place}.tool_calls")
    return parsed


def _string(message: dict[str, Any], field: str, place: str) -> str | None:
    value = message.get(field)
    if value is not None and not isinstance(value, str):
        raise _wrong(f"{place}.{field} must be a string, not {type(value).__name__}", f"{place}.{field}")
    return value


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise _wrong(f"{place} must be a list of calls, not {type(calls).__name__}", place)
    return [_tool_call(call, f"{place}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(f"{place} must be an object with a function that has a name and arguments", place)
    parsed = {
        "type": "function",
        "function": {
            "name": function["name"],
            "arguments": _arguments(function.get("arguments"), f"{place}.function.arguments"),
        },
    }
    if (id := _string(call, "id", place)) is not None:
        parsed["id"] = id
    return parsed


def _arguments(given: Any, place: str) -> dict[str, Any]:
    if given is None or given == "":
        return {}
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{place} is not JSON: {error}", place) from None
    if not isinstance(value, dict):
        raise _wrong(f"{place} must be the text of a JSON object, not of a {type(value).__name__}", place)
    return value


def _texts(content: Any, role: Any, place: str) -> list[str]:
    """The texts of a content's parts; a string is one part."""
    if isinstance(content, str):
        return [content]
    if content is None and role == "assistant":
        return []  # an assistant's turn that was all refusal or calls
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        kind = "missing" if content is None else f"a {type(content).__name__}"
        raise _wrong(f"{place} is {kind}; it must be a string or a list of parts", place)
    check_num_parts(content, place)
    return [_part_text(part, f"{place}[{i}]") for i, part in enumerate(content)]


def check_num_parts(content: Sequence[Any], place: str) -> None:
    """Raises:
    RequestError: a message has more parts than fit.
    """
    if len(content) > MAX_PARTS:
        raise _wrong(f"{place} holds {len(content)} parts; at most {MAX_PARTS} fit", place)


def _part_text(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise _wrong(f"{place} must be an object with a type, not {type(part).__name__}", place)
    kind = part.get("type", "text")
    if isinstance(kind, str) and kind in _MEDIA_PARTS:
        raise UnsupportedError(
            f"{place} is of type {kind}, and the model takes no {_MEDIA_PARTS[kind]}: send text only", param=place
        )
    field = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise UnsupportedError(f"{place}: parts of type {kind!r} are not supported; send text", param=place)
    text = part.get(field)
    if not isinstance(text, str):
        raise _wrong(f"{place}.{field} must be a string, not {type(text).__name__}", f"{place}.{field}")
    return text


def _wrong(message: str, param: str) -> RequestError:
    return RequestError(message, param=param)
