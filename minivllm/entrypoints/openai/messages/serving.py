"""Anthropic's messages, spoken through chat: bodies and events of its shape."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import msgspec

from minivllm.entrypoints.openai.chat_objects import (
    CallArguments,
    CallBegin,
    ChunkReader,
    End,
    Piece,
    Reasoning,
    ServingChatObjects,
    Text,
    pieces_of,
    renamed,
)
from minivllm.entrypoints.openai.errors import anthropic_error
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
from minivllm.exceptions import RequestError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from minivllm.entrypoints.openai.chat_completion.protocol import ChatCompletion, ChatCompletionChunk

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "repetition": "end_turn"}


class ServingMessages:
    def __init__(self, chat: ServingChatObjects, lifecycle: Lifecycle, keep_alive_s: float) -> None:
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
            if not request.stream:
                return json_response(_message(await self._chat.whole(asked, raw_request)))
            chunks = await self._chat.stream(asked, raw_request)
        except RequestError as error:
            raise renamed(error, NAMES) from None
        stream = NamedEventStream(
            _events(chunks),
            request_id=str(raw_request.scope.get("minivllm.request_id")),
            lifecycle=self._lifecycle,
            keep_alive_s=self._keep_alive_s,
            failure=anthropic_error,
        )
        return await stream.start()

    async def count_tokens(self, request: CountTokensRequest) -> Response:
        """Raises:
        RequestError: the request is wrong.
        """
        return json_response(TokenCount(await self._chat.count_tokens(to_chat(request))))


def _message(body: ChatCompletion) -> Message:
    content: list[Block] = []
    pieces = pieces_of(body)
    for piece in pieces:
        if isinstance(piece, Reasoning):
            content.append(ThinkingBlock(piece.text))
        elif isinstance(piece, Text):
            content.append(TextBlock(piece.text))
        elif isinstance(piece, CallBegin):
            content.append(ToolUseBlock(piece.id, piece.name, {}))
        elif isinstance(piece, CallArguments):
            content[-1].input = _arguments(piece.text)
    end = pieces[-1]
    message = Message(_id(body.id), body.model, content, _usage(body.usage))
    message.stop_reason, message.stop_sequence = _ending(end)
    return message


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; those of a call that the length has cut are no JSON, and are not made up."""
    with contextlib.suppress(msgspec.DecodeError):
        value = msgspec.json.decode(text or "{}")
        if isinstance(value, dict):
            return value
    return {}


def _id(chat_id: str) -> str:
    return "msg_" + chat_id.removeprefix("chatcmpl-")


def _usage(usage: Usage) -> MessagesUsage:
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return MessagesUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)


def _ending(end: End) -> tuple[str | None, str | None]:
    """stop_reason and stop_sequence. A stop token is an end of turn; a stop string is told."""
    if end.finish_reason == "stop" and isinstance(end.stop_reason, str):
        return "stop_sequence", end.stop_reason
    return _STOP_REASONS.get(end.finish_reason, "end_turn"), None


async def _events(chunks: AsyncGenerator[ChatCompletionChunk, None]) -> AsyncGenerator[Any, None]:
    reader, writer = ChunkReader(), _EventMaker()
    started = False
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            pieces = reader.read(chunk)
            if not started and reader.usage is not None:
                started = True
                usage = _usage(reader.usage)
                usage.output_tokens = 0
                yield MessageStart(Message(_id(chunk.id), chunk.model, [], usage))
            for piece in pieces:
                for event in writer.piece(piece):
                    yield event
    for event in writer.finish(reader.end()):
        yield event


class _EventMaker:
    """Pieces of an answer to events: a block is open while pieces of its kind come."""

    def __init__(self) -> None:
        self._index = -1
        self._open: type | None = None  # kind of the block

    def piece(self, piece: Piece) -> list[Any]:
        if isinstance(piece, CallBegin):
            return self._switch(ToolUseBlock(piece.id, piece.name, {}))
        if isinstance(piece, CallArguments):
            return [BlockDelta(self._index, InputJsonDelta(piece.text))]
        if isinstance(piece, Reasoning):
            return [*self._into(ThinkingBlock("")), BlockDelta(self._index, ThinkingDelta(piece.text))]
        return [*self._into(TextBlock("")), BlockDelta(self._index, TextDelta(piece.text))]

    def _into(self, block: Block) -> list[Any]:
        return [] if self._open is type(block) else self._switch(block)

    def _switch(self, block: Block) -> list[Any]:
        events = self._close()
        self._index += 1
        self._open = type(block)
        return [*events, BlockStart(self._index, block)]

    def _close(self) -> list[Any]:
        was_open, self._open = self._open is not None, None
        return [BlockStop(self._index)] if was_open else []

    def finish(self, end: End) -> list[Any]:
        stop_reason, stop_sequence = _ending(end)
        return [*self._close(), MessageDelta(Ending(stop_reason, stop_sequence), _usage(end.usage)), MessageStop()]
