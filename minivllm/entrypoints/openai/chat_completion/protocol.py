"""POST /v1/chat/completions: the bodies."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import model_validator

from minivllm.entrypoints.openai.protocol import PromptLogprobsBody, Usage
from minivllm.entrypoints.openai.sampling_fields import SamplingFields
from minivllm.exceptions import RequestError, UnsupportedError

# What the server gives to the template itself, or the library's function takes for its own; a request may not.
RESERVED_TEMPLATE_KWARGS = frozenset(
    (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
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
    )
)


class ChatFields(SamplingFields):
    """What the rendering of a conversation needs; /tokenize takes it too."""

    messages: list[Any]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_template_fields(self) -> ChatFields:
        if not self.messages:
            raise RequestError("messages is empty; send at least one", param="messages")
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other; set add_generation_prompt=false",
                param="continue_final_message",
            )
        if reserved := RESERVED_TEMPLATE_KWARGS & (self.chat_template_kwargs or {}).keys():
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(sorted(reserved))}",
                param="chat_template_kwargs",
            )
        return self


class ChatCompletionRequest(ChatFields):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatCompletionRequest:
        if self.tools and self.tool_choice != "none":
            raise UnsupportedError(
                'tools is not supported yet; leave it out or set tool_choice="none"', param="tools"
            )
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            raise RequestError(
                f"max_completion_tokens must be at least 1, got {self.max_completion_tokens}",
                param="max_completion_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        if self.logprob_token_ids is not None and not self.logprobs:
            raise RequestError("logprob_token_ids needs logprobs=true", param="logprob_token_ids")
        return self

    @property
    def num_tokens_asked(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """The most likely to report; with logprob_token_ids those take their place, as many as they are."""
        if self.logprob_token_ids is not None:
            return self.top_logprobs or len(self.logprob_token_ids)
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]


class Message(msgspec.Struct):
    role: str
    content: str
    refusal: str | None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, tag_field="object", tag="chat.completion"):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobsBody | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class Delta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, tag_field="object", tag="chat.completion.chunk"):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType = UNSET
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
