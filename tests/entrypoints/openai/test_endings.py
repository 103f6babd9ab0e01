"""How work ends early: the client leaves, or the server stops."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from minivllm.entrypoints.openai.errors import ServerClosingError
from minivllm.entrypoints.openai.sse import EventWriter
from tests.entrypoints.openai.conftest import Api, events


class Connection:
    """One POST, spoken in ASGI, so that the client can leave at any point."""

    def __init__(self, api: Api, path: str, body: dict) -> None:
        self.api = api
        self.sent: list[dict] = []
        self.first_chunk = asyncio.Event()
        self._body: dict | None = {
            "type": "http.request",
            "body": json.dumps(body).encode(),
            "more_body": False,
        }
        self._left = asyncio.Event()
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        self.done = asyncio.ensure_future(api.app(scope, self._receive, self._send))

    async def _receive(self) -> dict:
        if self._body is not None:
            body, self._body = self._body, None
            return body
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.first_chunk.set()

    def leave(self) -> None:
        self._left.set()

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.sent).decode()


ASK = {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]}
PATHS = ["/v1/completions", "/v1/chat/completions"]


async def until_open(api: Api, count: int) -> None:
    while api.engine.num_open != count:
        await asyncio.sleep(0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_aborted(api: Api, path: str, stream: bool):
    async def talk(_client: httpx.AsyncClient) -> None:
        api.engine.go_on.clear()
        connection = Connection(api, path, {**ASK, "stream": stream})
        await until_open(api, 1)
        if stream:
            await connection.first_chunk.wait()
        connection.leave()
        await connection.done
        assert api.engine.num_open == 0
        assert api.lifecycle.num_open == 0

    api.run(talk)


def test_a_client_that_leaves_takes_all_its_prompts_along(api: Api):
    async def talk(_client: httpx.AsyncClient) -> None:
        api.engine.go_on.clear()
        connection = Connection(api, "/v1/completions", {"prompt": ["a", "b", "c"], "n": 2, "stream": True})
        await until_open(api, 3)
        connection.leave()
        await connection.done
        assert api.engine.num_open == 0

    api.run(talk)


@pytest.mark.parametrize("path", PATHS)
def test_closing_ends_open_streams_with_an_error_event(api: Api, path: str):
    async def talk(_client: httpx.AsyncClient) -> None:
        api.engine.go_on.clear()
        connections = [Connection(api, path, {**ASK, "stream": True}) for _ in range(3)]
        for connection in connections:
            await connection.first_chunk.wait()
        api.lifecycle.close()
        for connection in connections:
            await connection.done
            *_, last = events(connection.text)
            assert last["error"]["code"] == 503
            assert connection.sent[-1]["more_body"] is False
        assert api.engine.num_open == 0
        assert api.lifecycle.num_open == 0

    api.run(talk)


def test_closing_answers_whole_requests_with_503(api: Api):
    async def talk(client: httpx.AsyncClient) -> None:
        api.engine.go_on.clear()
        asking = asyncio.ensure_future(client.post("/v1/completions", json=ASK))
        await until_open(api, 1)
        api.lifecycle.close()
        response = await asking
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert api.engine.num_open == 0

    api.run(talk)


def test_a_draining_server_finishes_what_is_open_and_takes_nothing_new(api: Api):
    async def talk(client: httpx.AsyncClient) -> None:
        api.engine.go_on.clear()
        asking = asyncio.ensure_future(client.post("/v1/completions", json=ASK))
        await until_open(api, 1)
        api.lifecycle.begin_drain()
        refused = await client.post("/v1/completions", json=ASK)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, 503)
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/metrics")).status_code == 200
        assert not await api.lifecycle.wait_idle(0.001)
        api.engine.go_on.set()
        assert (await asking).status_code == 200
        assert await api.lifecycle.wait_idle(1)

    api.run(talk)


class _Choice:
    def __init__(self, index: int, finish_reason: str | None) -> None:
        self.index, self.finish_reason = index, finish_reason


def test_a_stream_is_written_to_its_end_once():
    async def main() -> None:
        sent: list[bytes] = []

        async def send(message: dict) -> None:
            sent.append(message["body"])

        writer = EventWriter(send, 1)
        await writer.fail(ServerClosingError())
        await writer.fail(ServerClosingError())
        assert writer.ended
        assert b"".join(sent).count(b"[DONE]") == 1

    asyncio.run(main())
