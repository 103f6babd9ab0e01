"""Conversations as text: the chat template, and the same in Python with the parts to train on marked.

Owns the special tokens and the layout of roles, tools and tool calls (Hermes-style JSON in `<tool_call>`). The
template is what ships; `segments` must render what it renders.
"""

from __future__ import annotations

import json
from typing import Any

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD, END_OF_TEXT, TURN_START, TURN_END]
# One token each, but text: a client that parses calls must see them.
MARKERS = ["<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

TOOLS_BEFORE = "You may call these functions:\n<tools>"
TOOLS_AFTER = '\n</tools>\nTo call one, answer:\n<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'

CHAT_TEMPLATE = (
    "{%- set start = '" + TURN_START + "' -%}"
    "{%- set end = '" + TURN_END + "\n' -%}"
    "{%- set has_system = messages and messages[0].role == 'system' -%}"
    "{%- if tools -%}"
    "{{ start + 'system\n' }}"
    "{%- if has_system -%}{{ messages[0].content + '\n' }}{%- endif -%}"
    "{{ '" + TOOLS_BEFORE.replace("\n", "\\n") + "' }}"
    "{%- for tool in tools -%}{{ '\n' + (tool.function | tojson) }}{%- endfor -%}"
    "{{ '" + TOOLS_AFTER.replace("\n", "\\n") + "' + end }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set content = message.content or '' -%}"
    "{%- if message.role == 'system' -%}"
    "{%- if not (tools and loop.first) -%}{{ start + 'system\n' + content + end }}{%- endif -%}"
    "{%- elif message.role == 'user' -%}{{ start + 'user\n' + content + end }}"
    "{%- elif message.role == 'assistant' -%}"
    "{{ start + 'assistant\n' + content }}"
    "{%- for call in message.tool_calls or [] -%}"
    "{%- set call = call.function or call -%}"
    "{%- if content or not loop.first -%}{{ '\n' }}{%- endif -%}"
    "{{ '<tool_call>\n{\"name\": ' + (call.name | tojson) + ', \"arguments\": ' }}"
    "{{- call.arguments if call.arguments is string else (call.arguments | tojson) }}"
    "{{- '}\n</tool_call>' }}"
    "{%- endfor -%}"
    "{{ end }}"
    "{%- elif message.role == 'tool' -%}"
    "{{ start + 'tool\n<tool_response>\n' + content + '\n</tool_response>' + end }}"
    "{%- else -%}{{ raise_exception('unknown role: ' + message.role) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ start + 'assistant\n' }}{%- endif -%}"
)

Segment = tuple[str, bool]  # text, and whether the model is trained to say it


def segments(messages: list[dict[str, Any]], tools: list[dict] | None = None) -> list[Segment]:
    """A conversation's text in pieces, what the assistant says apart from what it reads."""
    pieces: list[Segment] = []
    if tools:
        system = messages[0]["content"] + "\n" if messages[0]["role"] == "system" else ""
        listed = "".join("\n" + to_json(tool["function"]) for tool in tools)
        pieces.append((f"{TURN_START}system\n{system}{TOOLS_BEFORE}{listed}{TOOLS_AFTER}{TURN_END}\n", False))
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system" and tools and index == 0:
            continue
        if role == "assistant":
            pieces += [
                (f"{TURN_START}assistant\n", False),
                (assistant_text(message) + TURN_END, True),
                ("\n", False),
            ]
        elif role == "tool":
            body = f"<tool_response>\n{message['content']}\n</tool_response>"
            pieces.append((f"{TURN_START}tool\n{body}{TURN_END}\n", False))
        else:
            pieces.append((f"{TURN_START}{role}\n{message['content']}{TURN_END}\n", False))
    return pieces


def assistant_text(message: dict[str, Any]) -> str:
    """What the assistant writes: its content, then its calls."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    lines = [
        f'<tool_call>\n{{"name": {to_json(call["name"])}, "arguments": {call["arguments"]}}}\n</tool_call>'
        for call in calls
    ]
    return "\n".join(([message["content"]] if message["content"] else []) + lines)


def parse_calls(text: str) -> list[tuple[str, Any]]:
    """The (name, arguments) of each call in what the assistant wrote; an unreadable one is ("", None)."""
    found: list[tuple[str, Any]] = []
    for piece in text.split("<tool_call>")[1:]:
        try:
            call = json.loads(piece.split("</tool_call>")[0])
            found.append((call["name"], call["arguments"]))
        except (ValueError, KeyError, TypeError):
            found.append(("", None))
    return found


def to_json(value: Any) -> str:
    """JSON as the template's `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)
