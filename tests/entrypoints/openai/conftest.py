"""The app on a fake engine, asked in-process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from minivllm.entrypoints.openai.app import build_app
from minivllm.entrypoints.openai.app_state import StatLoggers, init_app_state
from tests.entrypoints.openai.fakes import FakeEngine, server_args


class Api:
    """The app and a client to it. `run` takes a coroutine function of the Api and runs it on a fresh loop."""

    def __init__(self, engine: FakeEngine, **args: Any) -> None:
        self.engine = engine
        self.stats = StatLoggers()
        namespace = server_args(**args)
        self.app = build_app(namespace)
        init_app_state(engine, namespace, self.app, self.stats)
        self.lifecycle = self.app.state.lifecycle

    def run(self, talk: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await talk(client)

        return asyncio.run(main())

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.run(lambda client: client.request(method, path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def complete(self, **body: Any) -> dict:
        response = self.post("/v1/completions", {"prompt": "Hi", **body})
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, **body: Any) -> dict:
        response = self.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **body}
        )
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str = "/v1/completions", **body: Any) -> list[dict]:
        """The chunks of a stream that ends well or with an error; its grammar is checked."""
        ask = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
        response = self.post(path, {**ask, "stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response.text)


def events(text: str) -> list[dict]:
    """Parse a stream: chunk* (finish usage? | error) [DONE]."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    *payloads, done = [line.removeprefix("data: ") for line in lines]
    assert done == "[DONE]"
    chunks = [json.loads(payload) for payload in payloads]
    assert all("error" not in chunk for chunk in chunks[:-1])
    finished = [c["index"] for chunk in chunks for c in chunk.get("choices", ()) if c["finish_reason"]]
    assert len(finished) == len(set(finished))
    assert finished or "error" in chunks[-1]
    return chunks


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def api(engine: FakeEngine) -> Api:
    return Api(engine)
