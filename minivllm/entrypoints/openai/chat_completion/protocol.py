"""POST /v1/chat/completions: the bodies."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import model_validator

from minivllm.entrypoints.chat_utils import RESERVED_TEMPLATE_KWARGS
from minivllm.entrypoints.openai.protocol import PromptLogprobsBody, Usage
from minivllm.entrypoints.openai.render import Conversation
from minivllm.entrypoints.openai.sampling_fields import SamplingFields
from minivllm.entrypoints.tool_use import ToolUse, read_tool_use
from minivllm.exceptions import RequestError

MAX_MESSAGES = 16_384
MAX_DOCUMENTS = 1024
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class ChatFields(SamplingFields):
    """What the rendering of a conversation needs; /tokenize takes it too."""

    SUPPORTED_HERE: ClassVar[frozenset[str]] = frozenset(
        ("chat_template", "documents", "reasoning_effort", "tool_choice")
    )

    messages: list[Any]
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = True
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_template_fields(self) -> ChatFields:
        if not self.messages:
            raise RequestError("messages is empty; send at least one", param="messages")
        for name, most in {"messages": MAX_MESSAGES, "documents": MAX_DOCUMENTS}.items():
            if (count := len(getattr(self, name) or ())) > most:
                raise RequestError(f"{name} holds {count}; at most {most} fit", param=name)
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other; set add_generation_prompt=false",
                param="continue_final_message",
            )
        if self.reasoning_effort not in (None, *REASONING_EFFORTS):
            raise RequestError(
                f"reasoning_effort must be one of {', '.join(REASONING_EFFORTS)}, got {self.reasoning_effort[:40]!r}",
                param="reasoning_effort",
            )
        self._tool_use = read_tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)
        if reserved := RESERVED_TEMPLATE_KWARGS & (self.chat_template_kwargs or {}).keys():
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(sorted(reserved))}",
                param="chat_template_kwargs",
            )
        return self

    _tool_use: ToolUse

    @property
    def tool_use(self) -> ToolUse:
        return self._tool_use

    def conversation(self, *, with_tools: bool = True) -> Conversation:
        """What is to be rendered. The effort is given to the template, as some know it, and as others do: on or off."""
        effort = self.reasoning_effort
        variables = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return Conversation(
            messages=self.messages,
            tools=self.tools if with_tools else None,
            documents=self.documents,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            add_special_tokens=self.add_special_tokens,
            chat_template=self.chat_template,
            template_kwargs={**variables, **(self.chat_template_kwargs or {})},
        )


class ChatCompletionRequest(ChatFields):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    include_reasoning: bool = True

    @model_validator(mode="after")
    def _check_chat(self) -> ChatCompletionRequest:
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


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str  # the text of a JSON object


class ToolCall(msgspec.Struct):
    """A call that was cut, or went wrong, is `incomplete`: its arguments are the beginning of an object."""

    id: str
    function: FunctionCall
    type: str = "function"
    incomplete: bool | UnsetType = UNSET


class Message(msgspec.Struct):
    role: str
    content: str | None
    refusal: str | None = None
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


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


class FunctionDelta(msgspec.Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct):
    """Of a call: first its id and name, then pieces of its arguments; the last of a call that was cut says so."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta | UnsetType = UNSET
    incomplete: bool | UnsetType = UNSET


class Delta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.reasoning or self.tool_calls)


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
