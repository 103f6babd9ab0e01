"""Most requests do not go FastAPI's way, and nobody can tell."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from minivllm.entrypoints.openai.short_way import ShortWay
from minivllm.exceptions import EngineDeadError, EngineGenerateError, QueueFullError
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import FakeEngine

JSON = {"content-type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
ASKS = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": CHAT,
    "/v1/messages": {**CHAT, "max_tokens": 5, "model": "fake"},
    "/v1/responses": {"input": "Hi"},
}
BODIES = {
    "whole": {},
    "stream": {"stream": True},
    "a field of the wrong type": {"temperature": "hot", "stream": []},
    "a value out of range": {"temperature": 17},
    "no such model": {"model": "other"},
    "a field that is refused": {"kv_transfer_params": {"a": 1}},
    "a field that nobody defines": {"tempreature": 1},
}
CONTENTS = [b"", b"{", b"[1]", b"null", b'"x"', b"\xff", b"[" * 10_000, rb'{"prompt": "\ud800"}', b'{"prompt": 1e999}']
CONTENT_TYPES = [
    "application/json; charset=utf-8",
    "APPLICATION/JSON",
    " application/json",
    "application/problem+json",
    "text/plain",
    "",
]


def long_way(engine: FakeEngine, **args: Any) -> Api:
    api = Api(engine, **args)
    api.app.user_middleware = [one for one in api.app.user_middleware if one.cls is not ShortWay]
    return api


def shown(response: httpx.Response) -> tuple[int, dict, str]:
    """An answer without what differs from one request to the next."""
    text = re.sub(r'"created(_at)?":\d+|[0-9a-f]{32}', "…", response.text)
    headers = dict(response.headers)
    headers.pop("x-request-id", None)
    return response.status_code, headers, text


def both(ask: dict[str, Any], *, refuses: Exception | None = None, **args: Any) -> list[tuple[int, dict, str]]:
    answers = []
    for make in (Api, long_way):
        engine = FakeEngine()
        engine.refuses = refuses
        answers.append(shown(make(engine, **args).request(**{"method": "POST", **ask})))
    return answers


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("change", BODIES.values(), ids=BODIES)
def test_both_ways_answer_alike(path: str, change: dict):
    short, long = both({"path": path, "json": {**ASKS[path], **change}})
    assert short == long


@pytest.mark.parametrize("content", CONTENTS)
def test_both_ways_say_the_same_of_a_body_that_cannot_be_read(content: bytes):
    short, long = both({"path": "/v1/completions", "content": content, "headers": JSON})
    assert short == long
    assert short[0] == 400


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_both_ways_take_the_same_types_of_content(content_type: str):
    content = json.dumps(ASKS["/v1/completions"]).encode()
    short, long = both({"path": "/v1/completions", "content": content, "headers": {"content-type": content_type}})
    assert short == long


@pytest.mark.parametrize("error", [QueueFullError("full", reason="x"), EngineGenerateError("no"), EngineDeadError()])
@pytest.mark.parametrize("path", ASKS)
def test_both_ways_fail_alike(path: str, error: Exception):
    short, long = both({"path": path, "json": ASKS[path]}, refuses=error)
    assert short == long
    assert short[0] >= 500


def test_a_failure_of_ours_is_a_500_on_both_ways():
    short, long = both({"path": "/v1/completions", "json": ASKS["/v1/completions"]}, refuses=ZeroDivisionError())
    assert short == long
    assert short[0] == 500


@pytest.mark.parametrize(
    "ask",
    [
        {"method": "GET", "path": "/v1/completions"},
        {"path": "/v1/completions/"},
        {"path": "/v1/completions/x"},
        {"path": "/v1/completions?x=1"},
        {"path": "/v1/responses/x/cancel"},
        {"path": "/proxied/v1/completions"},
        {"path": "/v1/completions", "headers": {"origin": "http://elsewhere", "x-request-id": "mine"}},
    ],
    ids=str,
)
def test_both_ways_know_the_same_paths(ask: dict):
    short, long = both({"json": ASKS["/v1/completions"], **ask}, root_path="/proxied")
    assert short == long


class Seen:
    """The app, and the scope of the last request it had."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        self.scope = scope
        await self._app(scope, receive, send)

    @property
    def went_the_long_way(self) -> bool:
        return "fastapi_middleware_astack" in self.scope


@pytest.mark.parametrize("path", ASKS)
def test_what_is_right_goes_the_short_way_and_what_is_wrong_the_long_one(api: Api, path: str):
    api.app = Seen(api.app)
    assert api.post(path, ASKS[path]).status_code == 200
    assert not api.app.went_the_long_way
    assert api.app.scope["route"].path == path
    assert api.post(path, {**ASKS[path], "stream": "perhaps"}).status_code == 400
    assert api.app.went_the_long_way


def test_a_client_that_leaves_within_its_body_is_answered_alike():
    async def receive() -> dict:
        return {"type": "http.disconnect"}

    def statuses(api: Api) -> list[int]:
        sent: list[dict] = []

        async def send(message: dict) -> None:
            sent.append(message)

        async def talk(_client: httpx.AsyncClient) -> None:
            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
            await api.app({**scope, "query_string": b""}, receive, send)

        api.run(talk)
        return [message["status"] for message in sent if "status" in message]

    assert statuses(Api(FakeEngine())) == statuses(long_way(FakeEngine()))
