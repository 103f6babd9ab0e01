"""POST /v1/responses: the bodies. https://platform.openai.com/docs/api-reference/responses"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import msgspec
from pydantic import BaseModel, ConfigDict, model_validator

from minivllm.entrypoints.openai.accepted_values import (
    COMMON,
    Accepts,
    anything,
    empty,
    null,
    one_of,
    refuse_others,
)
from minivllm.exceptions import RequestError

# Fields of the API that this server does not act on: name -> the values for which that changes nothing.
ACCEPTED: dict[str, Accepts] = {
    **COMMON,
    "background": empty,
    "context_management": empty,
    "conversation": empty,
    "enable_response_messages": empty,
    "include": lambda v: not set(v or ()) - {"message.output_text.logprobs", "reasoning.encrypted_content"},
    "max_tool_calls": null,
    "moderation": empty,
    "previous_input_messages": empty,
    "prompt": empty,
    "stream_options": anything,
    "truncation": one_of(None, "disabled"),
    "user": anything,
}


MAX_INCLUDE = 64
MAX_METADATA_CHARS = 65_536  # as JSON; they come back in every answer, and are stored with it


class ResponsesRequest(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())
    KNOWN_ELSEWHERE: ClassVar[frozenset[str]] = frozenset(ACCEPTED)

    model: str | None = None
    input: str | list[Any]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    stream: bool | None = False
    metadata: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None

    # vLLM's own, as in chat.
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, body: Any) -> Any:
        if isinstance(body, dict):
            refuse_others(ACCEPTED, body)
        return body

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        if self.input == "" or self.input == []:
            raise RequestError("input is empty", param="input")
        if len(self.include or ()) > MAX_INCLUDE:
            raise RequestError(f"include holds {len(self.include)}; at most {MAX_INCLUDE} fit", param="include")
        if (size := len(json.dumps(self.metadata))) > MAX_METADATA_CHARS:
            raise RequestError(
                f"metadata is {size} characters of JSON; at most {MAX_METADATA_CHARS} fit", param="metadata"
            )
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise RequestError(
                f"max_output_tokens must be at least 1, got {self.max_output_tokens}", param="max_output_tokens"
            )
        return self

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    content: list[OutputText]
    status: str = "in_progress"
    role: str = "assistant"


class ReasoningItem(msgspec.Struct, tag_field="type", tag="reasoning"):
    id: str
    content: list[ReasoningText]
    status: str = "in_progress"
    summary: list[Any] = []
    encrypted_content: None = None


class CallItem(msgspec.Struct, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: str = "in_progress"


Item = MessageItem | ReasoningItem | CallItem


class InputDetails(msgspec.Struct):
    cached_tokens: int = 0


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """In tokens."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails


class ResponseBody(msgspec.Struct, tag_field="object", tag="response"):
    """What the request asked for comes back beside the answer."""

    id: str
    created_at: int
    model: str
    output: list[Item]
    status: str = "in_progress"  # completed, incomplete, failed
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    usage: ResponseUsage | None = None
    instructions: str | None = None
    metadata: dict[str, Any] = {}
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    truncation: str = "disabled"
    background: bool = False
    store: bool = True
    service_tier: str = "default"


class Event(msgspec.Struct, omit_defaults=True):
    """One event of a stream; which of the fields it has follows from its type."""

    type: str
    sequence_number: int
    response: ResponseBody | None = None
    output_index: int | None = None
    item_id: str | None = None
    content_index: int | None = None
    item: Item | None = None
    part: OutputText | ReasoningText | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None
    name: str | None = None
    logprobs: list[Any] | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None


class Deleted(msgspec.Struct, tag_field="object", tag="response"):
    id: str
    deleted: bool = True
