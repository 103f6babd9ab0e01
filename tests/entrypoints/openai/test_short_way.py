"""Most requests do not go FastAPI's way, and nobody can tell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from pydantic import TypeAdapter
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from minivllm.entrypoints.openai import middleware
from minivllm.entrypoints.openai.short_way import ShortWay
from minivllm.entrypoints.openai.utils import require_json
from minivllm.exceptions import EngineDeadError, EngineGenerateError, QueueFullError, RequestError
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


@pytest.mark.parametrize("types", [("application/json", "text/plain"), ("text/plain", "application/json")])
def test_both_ways_take_the_first_of_two_types_of_content(types: tuple[str, str]):
    headers = [("content-type", one) for one in types]
    content = json.dumps(ASKS["/v1/completions"]).encode()
    short, long = both({"path": "/v1/completions", "content": content, "headers": headers})
    assert short == long
    assert (short[0] == 200) == (types[0] == "application/json")


async def pieces():
    yield b'{"prompt": '
    yield b'"' + b"x" * 100 + b'"}'


def test_both_ways_refuse_a_body_that_turns_out_too_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(middleware, "MAX_BODY_BYTES", 100)
    answers = []
    for make in (Api, long_way):
        response = make(FakeEngine()).request("POST", "/v1/completions", content=pieces(), headers=JSON)
        answers.append(shown(response))
    assert answers[0] == answers[1]
    assert answers[0][0] == 413 and answers[0][1]["connection"] == "close"


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
        {"method": "HEAD", "path": "/v1/completions"},
        {"method": "OPTIONS", "path": "/v1/completions"},
        {"method": "PUT", "path": "/v1/completions"},
        {"path": "/v1/completions/"},
        {"path": "/v1/completions/x"},
        {"path": "/v1/completions?x=1"},
        {"path": "/v1/responses/x/cancel"},
        {"path": "/v1/completions%0A"},
        {"path": "/proxied/v1/completions"},
        {"path": "/proxied/proxied/v1/completions"},
        {"path": "/proxiedv1/completions"},
        {"path": "/v1/completions", "headers": {"origin": "http://elsewhere", "x-request-id": "mine"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("root_path", ["/proxied", "/proxied/", "/"])
def test_both_ways_know_the_same_paths(ask: dict, root_path: str):
    short, long = both({"json": ASKS["/v1/completions"], **ask}, root_path=root_path)
    assert short == long


def test_a_root_path_with_a_slash_behind_it_is_the_one_without():
    assert both({"path": "/p/v1/completions", "json": ASKS["/v1/completions"]}, root_path="/p/")[1][0] == 200


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


class Handles:
    """Takes the place of what serves completions; counts its calls."""

    def __init__(self, handle: Callable[[Any, Request], Any]) -> None:
        self._handle = handle
        self.num_calls = 0

    async def create(self, request: Any, raw_request: Request) -> Response:
        self.num_calls += 1
        return await self._handle(request, raw_request)


def handled(handle: Callable[[Any, Request], Any], **args: Any) -> list[tuple[int, dict, str]]:
    """The answers of both ways to a sound body, whose handler must be called once on each."""
    answers = []
    for make in (Api, long_way):
        api = make(FakeEngine(), **args)
        api.app.state.serving_completion = handler = Handles(handle)
        answers.append(shown(api.post("/v1/completions", {"prompt": "Hi"})))
        assert handler.num_calls == 1
    return answers


def fails_to_validate() -> None:
    TypeAdapter(int).validate_python("one")


def fails_to_parse() -> None:
    json.loads("{")


def is_left() -> None:
    raise ClientDisconnect


def refuses() -> None:
    raise RequestError("not so", param="prompt")


def forbids() -> None:
    raise HTTPException(403, "not you", {"x-why": "because"})


@pytest.mark.parametrize(
    ("fail", "status"),
    [(fails_to_validate, 500), (fails_to_parse, 500), (is_left, 500), (refuses, 400), (forbids, 403)],
)
def test_what_a_handler_raises_is_answered_and_never_calls_it_again(fail: Callable[[], None], status: int):
    async def handle(request: Any, raw_request: Request) -> Response:
        fail()

    short, long = handled(handle)
    assert short == long
    assert short[0] == status
    assert set(json.loads(short[2])["error"]) == {"message", "type", "param", "code"}


def test_a_handler_sees_the_same_of_its_request_on_both_ways():
    async def handle(request: Any, raw_request: Request) -> Response:
        scope = raw_request.scope
        return JSONResponse(
            {
                "fields": request.model_dump(mode="json", exclude_unset=True),
                "bodies": [(await raw_request.body()).decode() for _ in range(2)],
                "json": await raw_request.json(),
                "state": raw_request.state.mark,
                "route": [scope["route"].path, scope["endpoint"].__name__, scope["path_params"]],
                "url": str(raw_request.url_for("create_completion")),
            }
        )

    short, long = handled(handle, middleware=[f"{__name__}.Marks"])
    assert short == long
    assert short[0] == 200, short


def test_what_a_response_does_after_its_last_byte_is_done_on_both_ways():
    done = []

    async def handle(request: Any, raw_request: Request) -> Response:
        return Response("ok", background=BackgroundTask(done.append, 1))

    short, long = handled(handle)
    assert short == long
    assert done == [1, 1]


@pytest.mark.parametrize("fail_after", [0, 1, 3])
@pytest.mark.parametrize("failure", [EngineDeadError(), RequestError("no"), ZeroDivisionError()], ids=repr)
@pytest.mark.parametrize("path", ASKS)
def test_both_ways_end_a_stream_that_fails_alike(path: str, failure: Exception, fail_after: int):
    answers = []
    for make in (Api, long_way):
        engine = FakeEngine()
        engine.fail_after, engine.failure = fail_after, failure
        answers.append(shown(make(engine).post(path, {**ASKS[path], "stream": True})))
    assert answers[0] == answers[1]


class Marks:
    """A user's middleware, plain ASGI: marks the request's state and the answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def marked(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-mark", b"1")]}
            await send(message)

        scope.setdefault("state", {})["mark"] = "set"
        await self._app(scope, receive, marked)


async def reads_the_body(request: Request, call_next: Any) -> Response:
    """A user's middleware, a function."""
    size = len(await request.body())
    response = await call_next(request)
    response.headers["x-size"] = str(size)
    return response


class BreaksTheBody:
    """A user's middleware that fails while a body is read."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def receive_no_more() -> dict:
            raise ZeroDivisionError

        await self._app(scope, receive_no_more, send)


@pytest.mark.parametrize("change", BODIES.values(), ids=BODIES)
def test_a_users_middleware_is_around_both_ways(change: dict):
    names = [f"{__name__}.{name}" for name in ("Marks", "reads_the_body")]
    ask = {"path": "/v1/completions", "json": {**ASKS["/v1/completions"], **change}}
    short, long = both(ask, middleware=names)
    assert short == long
    assert short[1]["x-mark"] == "1" and int(short[1]["x-size"]) > 10


def test_a_body_that_cannot_be_read_is_answered_alike():
    ask = {"path": "/v1/completions", "json": ASKS["/v1/completions"]}
    short, long = both(ask, middleware=[f"{__name__}.BreaksTheBody"])
    assert short == long
    assert short[0] == 400


def test_dependencies_that_somebody_overrides_are_called():
    async def refuse() -> None:
        raise HTTPException(403, "overridden")

    for make in (Api, long_way):
        api = make(FakeEngine())
        api.app.dependency_overrides[require_json] = refuse
        assert api.post("/v1/completions", {"prompt": "Hi"}).status_code == 403
