"""Server-sent events: the grammar of a stream, and the response that speaks it.

    stream := chunk* (finish usage? | error) [DONE]

with comment lines between them where nothing else came for a while, if that is asked for.
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
KEEP_ALIVE = b": keep-alive\n\n"
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


class TextEvent:
    """A chunk of which only a text changes from one to the next: the bytes around it, found by encoding one."""

    _MARK = "\ue000text\ue000"  # in no chunk's other fields: they are ours

    def __init__(self, make: Callable[[str], msgspec.Struct]) -> None:
        """make: the chunk with this text, no choice of which is finished."""
        self._before, mark, self._after = (b"data: %b\n\n" % _encode(make(self._MARK))).partition(_encode(self._MARK))
        assert mark, "the text is not in its chunk"

    def __call__(self, text: str) -> bytes:
        return b"%b%b%b" % (self._before, _encode(text), self._after)


class EventWriter:
    """The state machine: OPEN ── chunk ─▶ OPEN ── finish or fail ─▶ ENDED; nothing is written after the end."""

    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]], num_choices: int) -> None:
        self._send = send
        self._unfinished = set(range(num_choices))
        self._held = b""  # events behind the last finish: little follows, at once, and one write is cheaper than three
        self.ended = False
        self.num_written = 0

    async def chunk(self, chunk: Chunk | bytes) -> None:
        """Bytes are a whole event that finishes nothing."""
        assert not self.ended, "a chunk after the end of its stream"
        if isinstance(chunk, bytes):
            self.num_written += 1
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
            return
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                self._unfinished.discard(choice.index)
        self.num_written += 1
        event = b"data: %b\n\n" % _encode(chunk)
        if self._unfinished:
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
        else:
            self._held += event

    async def keep_alive(self) -> None:
        """A comment, which clients skip and proxies count as life."""
        if not self.ended:
            await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

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
        self.ended = True
        await self._send({"type": "http.response.body", "body": self._held + body, "more_body": False})


class NamedEventWriter(EventWriter):
    """Events with names, as Anthropic's messages and OpenAI's responses have: the name is the struct's `type`.

    The stream's own last event says that it ends well; `failure` makes the one that says it does not.
    """

    def __init__(
        self, send: Callable[[dict[str, Any]], Awaitable[None]], failure: Callable[[BaseException], msgspec.Struct]
    ) -> None:
        super().__init__(send, 0)
        self._failure = failure

    async def chunk(self, event: Any) -> None:
        assert not self.ended, "an event after the end of its stream"
        self.num_written += 1
        await self._send({"type": "http.response.body", "body": _named(event), "more_body": True})

    async def finish(self) -> None:
        await self._end(b"")

    async def fail(self, error: BaseException) -> None:
        if not self.ended:
            await self._end(_named(self._failure(error)))


def _named(event: Any) -> bytes:
    name = event.__struct_config__.tag or event.type
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _encode(event))


class EventStream(Response):
    """An ASGI response that streams chunks and closes their generator however it ends.

    keep_alive_s: after so long without a chunk, also before the first, a comment line is sent; 0: never.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[Chunk, None],
        *,
        num_choices: int,
        request_id: str,
        lifecycle: Lifecycle,
        keep_alive_s: float = 0,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = list(HEADERS)
        self._chunks = chunks
        self._num_choices = num_choices
        self._request_id = request_id
        self._lifecycle = lifecycle
        self._keep_alive_s = keep_alive_s
        self._first: Chunk | bytes | None = None
        self._waiting: asyncio.Future[Chunk | bytes | None] | None = None  # for the first, beside something else

    async def start(self) -> EventStream:
        """Wait for the first chunk, or for the time to keep the connection alive: until then a failure is a status."""
        if not self._keep_alive_s:
            self._first = await anext(self._chunks, None)
            return self
        self._waiting = asyncio.ensure_future(anext(self._chunks, None))
        try:
            await asyncio.wait({self._waiting}, timeout=self._keep_alive_s)
        except asyncio.CancelledError:
            await self._close()
            raise
        if self._waiting.done():
            self._waiting.result()  # raises what it raised
        return self

    def _make_writer(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> EventWriter:
        return EventWriter(send, self._num_choices)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        writer = self._make_writer(send)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await attend(self._write(writer), receive, self._lifecycle)
        except ClientDisconnected:
            logger.info("%s aborted: the client disconnected", self._request_id)
        except ServerClosingError as error:
            with contextlib.suppress(asyncio.TimeoutError):  # of a client that has stopped reading
                await asyncio.wait_for(writer.fail(error), LAST_EVENT_S)
        finally:
            await self._close()

    async def _close(self) -> None:
        """End the generator; it cannot be closed while the first chunk is still being waited for."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._waiting
        await self._chunks.aclose()

    async def _write(self, writer: EventWriter) -> None:
        if self._waiting is None:
            await self._write_chunks(writer)
            return
        keeper = asyncio.ensure_future(self._keep_alive(writer))
        try:
            await self._write_chunks(writer)
        finally:
            keeper.cancel()

    async def _keep_alive(self, writer: EventWriter) -> None:
        if not self._waiting.done():
            await writer.keep_alive()
        while not writer.ended:
            before = writer.num_written
            await asyncio.sleep(self._keep_alive_s)
            if writer.num_written == before:
                await writer.keep_alive()

    async def _write_chunks(self, writer: EventWriter) -> None:
        try:
            try:
                if self._waiting is not None:
                    self._first = await self._waiting
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
        finally:
            await self._close()


class NamedEventStream(EventStream):
    """A stream of events with names. failure: makes the last event of one that fails."""

    def __init__(
        self,
        events: AsyncGenerator[Any, None],
        *,
        request_id: str,
        lifecycle: Lifecycle,
        keep_alive_s: float,
        failure: Callable[[BaseException], msgspec.Struct],
    ) -> None:
        super().__init__(
            events, num_choices=0, request_id=request_id, lifecycle=lifecycle, keep_alive_s=keep_alive_s
        )
        self._failure = failure

    def _make_writer(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> EventWriter:
        return NamedEventWriter(send, self._failure)
