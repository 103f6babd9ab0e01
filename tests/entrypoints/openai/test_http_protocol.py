"""What reaches a connection, write by write. (The limits on heads: test_limits.py, test_server.py.)"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from minivllm.entrypoints.openai.http_protocol import limited_protocol

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
START = {"type": "http.response.start", "status": 200, "headers": []}


class Transport:
    """Remembers what is written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes) -> None:
        self.writes.append(bytes(data))  # first: the loop swallows what its callbacks raise
        assert not self.closed

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


def body(data: bytes, *, more: bool = True) -> dict:
    return {"type": "http.response.body", "body": data, "more_body": more}


def writes_of(answer: Callable[[Callable, Any], Awaitable[None]], requests: bytes = GET) -> list[bytes]:
    """What is written for the requests. answer: is given `send` and the protocol."""

    async def main() -> list[bytes]:
        async def app(scope: dict, receive: Any, send: Any) -> None:
            await answer(send, protocol)

        http = limited_protocol(10_000, 100)
        config = uvicorn.Config(app, http=http, lifespan="off", log_config=None, access_log=False)
        protocol = http(config, ServerState(), {})
        transport = Transport()
        protocol.connection_made(transport)
        protocol.data_received(requests)
        await asyncio.sleep(0.02)
        protocol.connection_lost(None)
        return transport.writes

    return asyncio.run(main())


def test_a_head_and_what_follows_at_once_are_one_write():
    async def answer(send: Callable, protocol: Any) -> None:
        await send(START)
        await send(body(b"one"))
        await send(body(b"two"))
        await send(body(b"", more=False))

    first, *rest = writes_of(answer)
    assert first.startswith(b"HTTP/1.1 200 OK\r\n") and first.endswith(b"\r\n\r\n3\r\none\r\n")
    assert rest == [b"3\r\ntwo\r\n", b"0\r\n\r\n"]


def test_a_head_that_nothing_follows_does_not_wait():
    async def answer(send: Callable, protocol: Any) -> None:
        await send(START)
        await asyncio.sleep(0.001)
        assert len(protocol.transport.writes) == 1
        await send(body(b"late", more=False))

    head, late = writes_of(answer)
    assert head.endswith(b"\r\n\r\n")
    assert late == b"4\r\nlate\r\n0\r\n\r\n"


def test_every_answer_of_a_connection_is_whole():
    async def answer(send: Callable, protocol: Any) -> None:
        await send(START)
        await send(body(b"x", more=False))

    writes = writes_of(answer, GET + GET)
    assert [write.count(b"HTTP/1.1 200") for write in writes] == [1, 1]
    assert all(write.endswith(b"1\r\nx\r\n0\r\n\r\n") for write in writes)


def test_an_answer_of_a_head_alone_is_written_before_its_connection_closes():
    async def answer(send: Callable, protocol: Any) -> None:
        await send({**START, "headers": [(b"connection", b"close"), (b"content-length", b"5")]})
        await send(body(b"", more=False))

    (head,) = writes_of(answer, GET.replace(b"GET", b"HEAD"))
    assert head.endswith(b"connection: close\r\ncontent-length: 5\r\n\r\n")


def test_a_head_is_not_written_to_a_connection_that_is_lost():
    async def answer(send: Callable, protocol: Any) -> None:
        await send(START)
        protocol.transport.close()

    assert writes_of(answer) == []
