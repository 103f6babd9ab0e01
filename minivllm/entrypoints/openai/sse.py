"""Server-sent events: the grammar of a stream, and the response that speaks it.

    stream := chunk* (finish usage? | error) [DONE]

A stream's only exits are a finish of every choice or one error event, each followed by [DONE].
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol

import msgspec
from starlette.responses import Response

from minivllm.entrypoints.openai.errors import ServerClosingError, error_body
from minivllm.entrypoints.openai.lifecycle import Lifecycle
from minivllm.entrypoints.openai.utils import ClientDisconnected, attend
from minivllm.exceptions import EngineGenerateError, RequestError
from minivllm.logger import init_logger

logger = init_logger(__name__)

LAST_EVENT_S = 1.0  # for the last event of a closing server to find room in the connection's buffer
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that buffers would hold tokens back
]
_encode = msgspec.json.Encoder().encode


class ChunkChoice(Protocol):
    index: int
    finish_reason: str | None


class Chunk(Protocol):
    choices: list[Any]  # of ChunkChoice


class EventWriter:
    """The state machine: OPEN ── chunk ─▶ OPEN ── finish or fail ─▶ ENDED; nothing is written after the end."""

    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]], num_choices: int) -> None:
        self._send = send
        self._unfinished = set(range(num_choices))
        self.ended = False

    async def chunk(self, chunk: Chunk) -> None:
        assert not self.ended, "a chunk after the end of its stream"
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                self._unfinished.discard(choice.index)
        await self._send(
            {"type": "http.response.body", "body": b"data: %b\n\n" % _encode(chunk), "more_body": True}
        )

    async def finish(self) -> None:
        """End well; an error when a choice never finished."""
        if self._unfinished:
            await self.fail(EngineGenerateError("the engine ended the stream before its answer was finished"))
        else:
            await self._end(DONE)

    async def fail(self, error: BaseException) -> None:
        """End with one error event, unless the stream has ended."""
        if not self.ended:
            await self._end(b"data: %b\n\n" % error_body(error) + DONE)

    async def _end(self, body: bytes) -> None:
        # One message, so that a cancellation cannot come between the last event and [DONE].
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        self.ended = True


class EventStream(Response):
    """An ASGI response that streams chunks and closes their generator however it ends."""

    def __init__(
        self,
        chunks: AsyncGenerator[Chunk, None],
        *,
        num_choices: int,
        request_id: str,
        lifecycle: Lifecycle,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = list(HEADERS)
        self._chunks = chunks
        self._num_choices = num_choices
        self._request_id = request_id
        self._lifecycle = lifecycle
        self._first: Chunk | None = None

    async def start(self) -> EventStream:
        """Wait for the first chunk: until then a failure is a status, not an event."""
        self._first = await anext(self._chunks, None)
        return self

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        writer = EventWriter(send, self._num_choices)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await attend(self._write(writer), receive, self._lifecycle)
        except ClientDisconnected:
            logger.info("%s aborted: the client disconnected", self._request_id)
        except ServerClosingError as error:
            with contextlib.suppress(asyncio.TimeoutError):  # of a client that has stopped reading
                await asyncio.wait_for(writer.fail(error), LAST_EVENT_S)
        finally:
            await self._chunks.aclose()

    async def _write(self, writer: EventWriter) -> None:
        async with contextlib.aclosing(self._chunks):
            try:
                if self._first is not None:
                    await writer.chunk(self._first)
                async for chunk in self._chunks:
                    await writer.chunk(chunk)
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.error("%s failed: %s: %s", self._request_id, type(error).__name__, error)
                await writer.fail(error)
            else:
                await writer.finish()
