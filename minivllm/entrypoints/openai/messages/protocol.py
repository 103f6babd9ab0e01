"""POST /v1/messages: Anthropic's bodies. https://docs.anthropic.com/en/api/messages"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, model_validator

from minivllm.exceptions import RequestError, UnsupportedError

MIN_THINKING_TOKENS = 1024

# Fields of the API that cannot change the answer here.
HARMLESS = frozenset({"metadata", "service_tier", "inference_geo", "betas"})


class CountTokensRequest(BaseModel):
    """What the prompt is made of."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    KNOWN_ELSEWHERE: ClassVar[frozenset[str]] = HARMLESS

    model: str | None = None
    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> CountTokensRequest:
        if not self.messages:
            raise RequestError("messages is empty; send at least one", param="messages")
        for name in ("container", "context_management", "mcp_servers"):
            if (self.model_extra or {}).get(name):
                raise UnsupportedError(f"{name} is not supported; leave it out", param=name)
        return self


class MessagesRequest(CountTokensRequest):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    cache_salt: str | None = None
    vllm_xargs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_tokens(self) -> MessagesRequest:
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {self.max_tokens}", param="max_tokens")
        budget = (self.thinking or {}).get("budget_tokens")
        if (self.thinking or {}).get("type") == "enabled":
            if type(budget) is not int or budget < MIN_THINKING_TOKENS:
                raise RequestError(
                    f"thinking.budget_tokens must be at least {MIN_THINKING_TOKENS}", param="thinking.budget_tokens"
                )
            if budget >= self.max_tokens:
                raise RequestError("budget_tokens must be less than max_tokens", param="thinking.budget_tokens")
        return self


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class MessagesUsage(msgspec.Struct):
    """In tokens; the input without those from the prefix cache, as Anthropic counts."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class Message(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    model: str
    content: list[Block]
    usage: MessagesUsage | None = None  # until its first event
    stop_reason: str | None = None
    stop_sequence: str | None = None
    role: str = "assistant"


class TokenCount(msgspec.Struct):
    input_tokens: int


# Events of a stream; the name of each is its type.


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    message: Message


class BlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    index: int
    content_block: Block


class TextDelta(msgspec.Struct, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class InputJsonDelta(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class BlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    index: int


class Ending(msgspec.Struct):
    stop_reason: str | None
    stop_sequence: str | None | UnsetType = UNSET


class MessageDelta(msgspec.Struct, tag_field="type", tag="message_delta"):
    delta: Ending
    usage: MessagesUsage


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    pass
