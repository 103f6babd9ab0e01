"""Anthropic's messages, spoken through chat: bodies and events of its shape."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import msgspec

from minivllm.entrypoints.openai.chat_completion.job import AnswerDelta, ChatJob
from minivllm.entrypoints.openai.errors import anthropic_error, renamed
from minivllm.entrypoints.openai.lifecycle import Lifecycle
from minivllm.entrypoints.openai.messages.convert import NAMES, to_chat
from minivllm.entrypoints.openai.messages.protocol import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountTokensRequest,
    Ending,
    InputJsonDelta,
    Message,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessagesUsage,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    TokenCount,
    ToolUseBlock,
)
from minivllm.entrypoints.openai.protocol import Usage, json_response
from minivllm.entrypoints.openai.sse import NamedEventStream
from minivllm.exceptions import EngineGenerateError, RequestError
from minivllm.tool_parsers.pieces import CallArguments, CallEnd, CallStart, Piece, Reasoning

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from minivllm.entrypoints.openai.chat_completion.serving import ServingChat

# Chat's reason of an end -> Anthropic's. That somebody has ended the request has no name there.
_STOP_REASONS = {
    "stop": "end_turn", "repetition": "end_turn", "tool_calls": "tool_use", "length": "max_tokens", "abort": None,
}  # fmt: skip


class ServingMessages:
    def __init__(self, chat: ServingChat, lifecycle: Lifecycle, keep_alive_s: float) -> None:
        self._chat = chat
        self._lifecycle = lifecycle
        self._keep_alive_s = keep_alive_s

    async def create(self, request: MessagesRequest, raw_request: Request) -> Response:
        """Answer one request, whole or as a stream.

        Raises:
            RequestError: the request is wrong; EngineError: it failed before its first event.
        """
        asked = to_chat(request)
        try:
            job = await self._chat.begin(asked, raw_request, api="messages")
            message = Message("msg_" + job.answering.id.removeprefix("chatcmpl-"), job.answering.model, [])
            events = _events(job, _Maker(message))
            if not request.stream:
                async for _ in events:
                    pass
                return json_response(message)
            request_id = str(raw_request.scope.get("minivllm.request_id"))
            stream = NamedEventStream(
                events,
                request_id=request_id,
                lifecycle=self._lifecycle,
                keep_alive_s=self._keep_alive_s,
                failure=lambda error: anthropic_error(error, request_id),
            )
            return await stream.start()
        except RequestError as error:
            raise renamed(error, NAMES) from None

    async def count_tokens(self, request: CountTokensRequest) -> Response:
        """Raises:
        RequestError: the request is wrong.
        """
        return json_response(TokenCount(await self._chat.count_tokens(to_chat(request))))


def _usage(usage: Usage) -> MessagesUsage:
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return MessagesUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)


async def _events(job: ChatJob, maker: _Maker) -> AsyncGenerator[Any, None]:
    """The answer's events; at their end the message is whole."""
    begun = False
    async with contextlib.aclosing(job.deltas()) as deltas:
        async for delta in deltas:
            if not begun:
                begun = True
                yield maker.begin(job.usage())
            for event in maker.add(delta):
                yield event
    for event in maker.finish(job.usage()):
        yield event


class _Maker:
    """Pieces of an answer to blocks, and to the events that tell of them: a block is open while its pieces come."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self._is_open = False  # the last block
        self._arguments = ""  # of the open call
        self._num_complete_calls = 0
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None

    def begin(self, usage: Usage) -> MessageStart:
        """usage: so far; what was generated is told at the end."""
        usage = _usage(usage)
        usage.output_tokens = 0
        return MessageStart(Message(self.message.id, self.message.model, [], usage))

    def add(self, delta: AnswerDelta) -> list[Any]:
        if delta.finish_reason is not None:
            self._finish_reason, self._stop_reason = delta.finish_reason, delta.stop_reason
        return [event for piece in delta.pieces for event in self._piece(piece)]

    def _piece(self, piece: Piece) -> list[Any]:
        if isinstance(piece, CallStart):
            self._arguments = ""
            return self._open(ToolUseBlock(piece.id, piece.name, {}))
        if isinstance(piece, CallArguments):
            self._arguments += piece.text
            return [BlockDelta(self._index, InputJsonDelta(piece.text))]
        if isinstance(piece, CallEnd):
            if piece.complete:
                self._num_complete_calls += 1
                self.message.content[-1].input = _arguments(self._arguments)
            return self._close()
        if isinstance(piece, Reasoning):
            events = self._into(ThinkingBlock)
            self.message.content[-1].thinking += piece.text
            return [*events, BlockDelta(self._index, ThinkingDelta(piece.text))]
        events = self._into(TextBlock)
        self.message.content[-1].text += piece.text
        return [*events, BlockDelta(self._index, TextDelta(piece.text))]

    @property
    def _index(self) -> int:
        return len(self.message.content) - 1

    def _into(self, kind: type[TextBlock] | type[ThinkingBlock]) -> list[Any]:
        """Be in a block of this kind: go on with the open one, or open one."""
        if self._is_open and isinstance(self.message.content[-1], kind):
            return []
        return self._open(kind(""))

    def _open(self, block: Block) -> list[Any]:
        events = self._close()
        self.message.content.append(block)
        self._is_open = True
        return [*events, BlockStart(self._index, copy.copy(block))]  # the block goes on changing

    def _close(self) -> list[Any]:
        was_open, self._is_open = self._is_open, False
        return [BlockStop(self._index)] if was_open else []

    def finish(self, usage: Usage) -> list[Any]:
        """The answer is over.

        Raises:
            EngineGenerateError: it never finished.
        """
        if self._finish_reason is None:
            raise EngineGenerateError("the engine ended before its answer was finished")
        message = self.message
        message.stop_reason, message.stop_sequence = self._ending()
        message.usage = _usage(usage)
        ending = Ending(message.stop_reason, message.stop_sequence)
        return [*self._close(), MessageDelta(ending, message.usage), MessageStop()]

    def _ending(self) -> tuple[str | None, str | None]:
        """stop_reason and stop_sequence. A stop token is an end of turn; a stop string is told."""
        if self._finish_reason == "stop":
            if isinstance(self._stop_reason, str):
                return "stop_sequence", self._stop_reason
            if self._num_complete_calls:  # one that was asked for by name, which ends as text does in chat
                return "tool_use", None
        return _STOP_REASONS[self._finish_reason], None


def _arguments(text: str) -> dict[str, Any]:
    """A complete call's arguments; what is no object after all is not made one."""
    with contextlib.suppress(msgspec.DecodeError):
        value = msgspec.json.decode(text)
        if isinstance(value, dict):
            return value
    return {}
