"""uvicorn's HTTP protocol with limits on a request's head, and with an answer's head in one write with what follows.

The limits are of a head's bytes, its lines, and the time it may take. uvicorn sets none with httptools: a client could
send headers for ever, or keep a connection open without asking.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from minivllm.entrypoints.openai.errors import error_body

HEAD_TIMEOUT_S = 30.0  # from the connection, or the first byte of a request on it, to the end of its head
_ENDINGS = {400: "HTTP/1.1 400 Bad Request", 431: "HTTP/1.1 431 Request Header Fields Too Large"}


def limited_protocol(max_head_bytes: int, max_headers: int) -> type[HttpToolsProtocol]:
    """A protocol class for uvicorn with these limits."""

    class Limited(LimitedProtocol):
        pass

    Limited.max_head_bytes, Limited.max_headers = max_head_bytes, max_headers
    return Limited


class LimitedProtocol(HttpToolsProtocol):
    max_head_bytes: int
    max_headers: int

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._num_head_bytes = 0
        self._in_head = True
        self._refused = False
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(HEAD_TIMEOUT_S, self._close_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._in_head and not self.transport.is_closing() and self._num_head_bytes > self.max_head_bytes:
            self._refuse(431, f"the request's head has more than {self.max_head_bytes} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._head_timer is None:  # a further request of the connection
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close_idle)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > self.max_headers and not self._refused:
            self._refuse(431, f"the request has more than {self.max_headers} header lines")

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._num_head_bytes = 0
        self._stop_timer()
        if not self._refused:
            before = self.cycle
            super().on_headers_complete()
            if self.cycle is not before:
                self.cycle.transport = _HeadHolder(self.cycle, self.loop)

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        self._refused = True
        self._stop_timer()
        body = error_body(HTTPException(status, message))
        head = (
            f"{_ENDINGS[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _close_idle(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _HeadHolder:
    """A cycle's transport until its first two writes: an answer's head waits for the bytes behind it, if these come
    before the loop does anything else. A write is a system call."""

    def __init__(self, cycle: RequestResponseCycle, loop: asyncio.AbstractEventLoop) -> None:
        self._cycle, self._loop = cycle, loop
        self._transport = cycle.transport
        self._held = b""

    def write(self, data: bytes) -> None:
        if self._held:
            self._flush(data)
        else:
            self._held = data
            self._loop.call_soon(self._flush)

    def _flush(self, more: bytes = b"") -> None:
        if self._held:
            self._cycle.transport = self._transport
            held, self._held = self._held, b""
            if not self._transport.is_closing():
                self._transport.write(held + more)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
