"""The server's own flags, one by one: what each changes for a client or in the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import subprocess
from importlib import import_module
from pathlib import Path

import httpx
import pytest
from uvicorn.config import LOGGING_CONFIG
from uvicorn.logging import AccessFormatter

from minivllm import logger as minivllm_logger
from minivllm.config.frontend import FrontendConfig
from minivllm.entrypoints.openai import http_protocol, sse, tls
from minivllm.entrypoints.openai.access_log import WithoutPaths, log_config, read_paths
from minivllm.entrypoints.openai.app import api_keys
from minivllm.entrypoints.openai.launcher import serve_http
from minivllm.entrypoints.openai.listen import create_server_socket, create_unix_socket, remove_unix_socket
from minivllm.entrypoints.openai.request_log import RequestLog
from minivllm.exceptions import ConfigError
from tests.entrypoints.openai.conftest import Api, events
from tests.entrypoints.openai.fakes import FakeEngine

ORIGIN = {"Origin": "http://page.example"}


def serve(api: Api, sock: socket.socket, talk, **frontend) -> None:
    """Serve the app on a socket, talk, and end."""

    async def main() -> None:
        listening = asyncio.Event()
        server = asyncio.ensure_future(
            serve_http(
                api.app, sock, engine=api.engine, lifecycle=api.lifecycle, on_listening=listening.set,
                frontend=FrontendConfig(uvicorn_log_level="warning", **frontend),
            )
        )  # fmt: skip
        await asyncio.wait([server, asyncio.ensure_future(listening.wait())], return_when=asyncio.FIRST_COMPLETED)
        try:
            await talk()
        finally:
            api.engine.die()  # the quickest way for a server to end
            with contextlib.suppress(Exception):
                await server

    asyncio.run(main())


# -- ids, CORS, fields


def test_errors_carry_an_id_and_cors_headers_whatever_failed(engine: FakeEngine):
    api = Api(engine, api_key=["k"])
    key = {"Authorization": "Bearer k", **ORIGIN}
    answers = [
        api.get("/v1/models", headers=ORIGIN),
        api.get("/nothing", headers=key),
        api.get("/v1/completions", headers=key),
        api.post("/v1/completions", {"prompt": ""}, headers=key),
        api.request("POST", "/v1/completions", content=b"\xff", headers={"content-type": "application/json", **key}),
        api.request("POST", "/v1/completions", content=b"", headers={"content-length": str(1 << 40), **key}),
    ]
    assert [answer.status_code for answer in answers] == [401, 404, 405, 400, 400, 413]
    for answer in answers:
        assert answer.headers["x-request-id"]
        assert answer.headers["access-control-allow-origin"] == "*"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    given = api.get("/nothing", headers={**key, "X-Request-Id": "mine"})
    assert given.headers["x-request-id"] == "mine"


def test_good_answers_carry_an_id_when_asked_to(engine: FakeEngine):
    body = {"prompt": "Hi"}
    assert "x-request-id" not in Api(engine).post("/v1/completions", body).headers
    answer = Api(engine, enable_request_id_headers=True).post("/v1/completions", body)
    assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"
    stream = Api(engine, enable_request_id_headers=True).post("/v1/completions", {**body, "stream": True})
    assert stream.headers["x-request-id"] and stream.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", ["x" * 300, "a\tb"])
def test_an_id_that_does_not_fit_a_header_is_replaced(engine: FakeEngine, name: str):
    answer = Api(engine).get("/nothing", headers={"X-Request-Id": name})
    assert len(answer.headers["x-request-id"]) == 32


def test_a_field_nobody_defines_is_named_once_in_the_log_and_in_each_answer(api: Api, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("minivllm"), "propagate", True)
    for _ in range(2):
        answer = api.post("/v1/completions", {"prompt": "Hi", "colour": 1, "a b": 2, "stream": True})
        assert answer.status_code == 200
        assert answer.headers["x-ignored-fields"] == "colour"
    # By identity: where an earlier test has configured logging, a record reaches the capture by two ways.
    assert len({id(record) for record in caplog.records if "colour" in record.getMessage()}) == 1


def test_strict_fields_refuse_it_with_the_nearest_name(engine: FakeEngine):
    api = Api(engine, strict_fields=True)
    error = api.post("/v1/completions", {"prompt": "Hi", "max_tokenz": 1}).json()["error"]
    assert (error["code"], error["param"]) == (400, "max_tokenz")
    assert "did you mean max_tokens?" in error["message"]
    assert api.post("/v1/completions", {"prompt": "Hi", "user": "u", "suffix": None}).status_code == 200


HARMLESS = {
    "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x",
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prediction": {"type": "content", "content": "x"},
    "session_id": "s", "verbosity": "medium", "include_reasoning": True,
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_fields_that_cannot_change_the_answer_are_accepted(engine: FakeEngine, path: str):
    body = {"prompt": "Hi"} if "chat" not in path else {"messages": [{"role": "user", "content": "Hi"}]}
    answer = Api(engine, strict_fields=True).post(path, {**body, **HARMLESS})
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers


@pytest.mark.parametrize("change", [{"store": True}, {"service_tier": "flex"}, {"verbosity": "low"}])
def test_and_those_that_would_are_refused(api: Api, change: dict):
    answer = api.post("/v1/completions", {"prompt": "Hi", **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, *change)


def post_nested(api: Api, depth: int) -> httpx.Response:
    content = f'{{"prompt": "Hi", "metadata": {"[" * (depth - 1) + "]" * (depth - 1)}}}'
    return api.request("POST", "/v1/completions", content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize("depth", [129, 100_000])
def test_json_that_is_too_deep_is_a_400(api: Api, depth: int):
    answer = post_nested(api, depth)
    assert answer.status_code == 400
    assert "128 levels" in answer.json()["error"]["message"]


def test_json_of_128_levels_is_read(api: Api):
    assert post_nested(api, 128).status_code == 200


def test_wide_json_is_not_deep(api: Api):
    assert api.post("/v1/completions", {"prompt": "Hi", "metadata": [[] for _ in range(1000)]}).status_code == 200


# -- keys


def test_metrics_can_be_protected_and_anthropics_header_is_a_key(engine: FakeEngine):
    api = Api(engine, api_key=["k"], protect_metrics=True)
    assert (api.get("/metrics").status_code, api.get("/health").status_code) == (401, 200)
    assert api.get("/metrics", headers={"x-api-key": "k"}).status_code == 200
    assert api.get("/metrics", headers={"x-api-key": "j"}).status_code == 401


@pytest.mark.parametrize(
    "path", ["/health/", "/metrics/../v1/models", "/%2fhealth", "/HEALTH", "/health%00", "/x/health"]
)
def test_what_only_looks_like_an_open_path_needs_the_key(engine: FakeEngine, path: str):
    assert Api(engine, api_key=["k"]).get(path).status_code == 401


def test_open_paths_are_those_behind_the_root_path(engine: FakeEngine):
    api = Api(engine, api_key=["k"], root_path="/api")
    assert (api.get("/api/health").status_code, api.get("/api/v1/models").status_code) == (200, 401)
    assert api.get("/api/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200


def test_vllms_variable_is_a_key_when_nothing_else_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert api_keys(FrontendConfig()) == ["theirs"]
    assert api_keys(FrontendConfig(api_key=["a"])) == ["a"]
    monkeypatch.setenv("MINIVLLM_API_KEY", "ours")
    assert api_keys(FrontendConfig()) == ["ours"]
    assert api_keys(FrontendConfig(api_key=["a"])) == ["a", "ours"]


# -- middleware


class Stamp:
    """An ASGI middleware as users write them."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def stamped(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-stamp", b"1")]
            await send(message)

        await self.app(scope, receive, stamped)


async def teapot(request, call_next):
    response = await call_next(request)
    response.headers["x-teapot"] = "1"
    return response


async def broken(request, call_next):
    raise ValueError("secret")


def test_middleware_is_a_class_or_a_function(engine: FakeEngine):
    api = Api(engine, middleware=[f"{__name__}.Stamp", f"{__name__}.teapot"], api_key=["k"])
    answer = api.get("/v1/models")  # also around a refusal
    assert (answer.status_code, answer.headers["x-stamp"], answer.headers["x-teapot"]) == (401, "1", "1")


def test_middleware_that_fails_is_a_500_of_the_usual_shape(engine: FakeEngine):
    answer = Api(engine, middleware=[f"{__name__}.broken"]).get("/health", headers=ORIGIN)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] and answer.headers["access-control-allow-origin"]


# -- load, usage, keep-alive, logs


@pytest.mark.parametrize("tracks", [True, False])
def test_the_load_is_what_is_being_answered(engine: FakeEngine, tracks: bool):
    api = Api(engine, enable_server_load_tracking=tracks)

    async def talk(client: httpx.AsyncClient) -> list[int]:
        engine.go_on.clear()
        posts = [
            asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "Hi", "stream": stream}))
            for stream in (True, False)
        ]
        while engine.num_open < 2:
            await asyncio.sleep(0)
        during = (await client.get("/load")).json()["server_load"]
        engine.go_on.set()
        await asyncio.gather(*posts)
        return [during, (await client.get("/load")).json()["server_load"]]

    assert api.run(talk) == ([2, 0] if tracks else [0, 0])


@pytest.mark.parametrize("shown", [True, False])
def test_usage_tells_cached_tokens_when_asked_to(engine: FakeEngine, shown: bool):
    engine.num_cached_tokens = 7
    api = Api(engine, enable_prompt_tokens_details=shown)
    details = {"cached_tokens": 7} if shown else None
    assert api.complete()["usage"]["prompt_tokens_details"] == details
    assert api.chat()["usage"]["prompt_tokens_details"] == details
    for path in ("/v1/completions", "/v1/chat/completions"):
        last = api.stream(path, stream_options={"include_usage": True})[-1]
        assert last["usage"]["prompt_tokens_details"] == details


@pytest.fixture
def kept_alive(monkeypatch) -> asyncio.Event:
    """Set once a comment was sent."""
    sent, keep_alive = asyncio.Event(), sse.EventWriter.keep_alive

    async def send(writer: sse.EventWriter) -> None:
        await keep_alive(writer)
        sent.set()

    monkeypatch.setattr(sse.EventWriter, "keep_alive", send)
    return sent


def test_an_idle_stream_sends_comments(engine: FakeEngine, kept_alive: asyncio.Event):
    api = Api(engine, sse_keep_alive_interval=1)
    api.app.state.serving_completion._settings.__dict__["keep_alive_s"] = 0.01

    async def talk(client: httpx.AsyncClient) -> str:
        engine.go_on.clear()
        post = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "Hi", "stream": True}))
        await kept_alive.wait()
        engine.go_on.set()
        return (await post).text

    text = api.run(talk)
    assert ": keep-alive\n\n" in text
    assert events(text.replace(": keep-alive\n\n", ""))[-1]["choices"][0]["finish_reason"]
    assert engine.num_open == 0


def test_a_stream_that_waits_for_its_first_token_is_kept_alive_and_closed(
    engine: FakeEngine, kept_alive: asyncio.Event
):
    api = Api(engine)
    api.app.state.serving_completion._settings.__dict__["keep_alive_s"] = 0.01
    engine.slow_start = asyncio.Event()

    async def talk(client: httpx.AsyncClient) -> str:
        post = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "Hi", "stream": True}))
        await kept_alive.wait()
        engine.slow_start.set()
        return (await post).text

    text = api.run(talk)
    assert text.startswith(": keep-alive")
    assert events(text.replace(": keep-alive\n\n", ""))


def test_requests_and_outputs_are_logged_when_asked_to(engine: FakeEngine, caplog, monkeypatch):
    root = logging.getLogger("minivllm")
    monkeypatch.setattr(root, "propagate", True)
    monkeypatch.setattr(root, "level", logging.DEBUG)
    Api(engine).complete(prompt="Secret")
    assert not any("Secret" in m or "Paris" in m for m in caplog.messages)
    Api(engine, enable_log_requests=True, max_log_len=3).complete(prompt="Secret")
    assert any("'Sec'" in m for m in caplog.messages) and not any("Secret" in m for m in caplog.messages)
    assert not any("Paris" in m for m in caplog.messages)
    Api(engine, enable_log_requests=True, enable_log_outputs=True).stream()
    assert any("Paris, bien" in m and "finished: length" in m for m in caplog.messages)
    assert any("… 'P'" in m for m in caplog.messages)


def test_nothing_stands_between_a_stream_and_its_client_when_outputs_are_not_logged():
    async def outputs():
        yield

    stream = outputs()
    assert RequestLog(outputs=False, deltas=True, max_len=None).watched("r", stream) is stream


def test_paths_can_be_kept_out_of_the_access_log():
    def kept(path: str) -> bool:
        args = ("127.0.0.1:1", "GET", path, "1.1", 200)
        record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "%s", args, None)
        return WithoutPaths(read_paths("/health, /metrics")).filter(record)

    assert [kept(path) for path in ("/health", "/metrics?x=1", "/v1/models", "/health/x")] == [False, False, True, True]


@pytest.mark.parametrize("use_colors", [False, True])
@pytest.mark.parametrize("status", [200, 404, 599])
def test_lines_of_the_access_log_are_uvicorns(status: int, use_colors: bool):
    ours, theirs = log_config()["formatters"]["access"], LOGGING_CONFIG["formatters"]["access"]
    assert ours["fmt"] == theirs["fmt"]
    args = ("127.0.0.1:1", "GET", "/v1/models?a=%20", "1.1", status)
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', args, None)
    formatters = [kind(theirs["fmt"], use_colors=use_colors) for kind in (AccessFormatter, _named(ours["()"]))]
    assert len({formatter.format(record) for formatter in formatters}) == 1


def _named(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def test_a_log_configuration_is_a_file_from_the_flag_or_the_environment(tmp_path: Path, monkeypatch):
    (tmp_path / "mine.json").write_text(
        json.dumps({"version": 1, "disable_existing_loggers": False, "loggers": {"a.b": {"level": "ERROR"}}})
    )
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "nowhere.json")
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        minivllm_logger.configure("Test")
    minivllm_logger.configure("Test", config_file=str(tmp_path / "mine.json"))
    assert logging.getLogger("a.b").level == logging.ERROR


# -- sockets


def test_the_server_listens_on_a_unix_socket(api: Api, tmp_path: Path):
    path = str(tmp_path / "api.sock")
    create_unix_socket(path).close()  # left by a server that was killed
    sock = create_unix_socket(path)

    async def talk() -> None:
        with pytest.raises(ConfigError, match="in use"):
            create_unix_socket(path)
        transport = httpx.AsyncHTTPTransport(uds=path)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            assert (await client.get("/health")).status_code == 200

    serve(api, sock, talk, uds=path)
    remove_unix_socket(sock, path)
    assert not Path(path).exists()
    Path(path).write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        create_unix_socket(path)


def certificate(directory: Path, name: str) -> tuple[str, str]:
    cert, key = str(directory / f"{name}.crt"), str(directory / f"{name}.key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_certificates_are_read_again_while_serving(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tls, "LOOK_EVERY_S", 0.01)
    first, second = certificate(tmp_path, "first"), certificate(tmp_path, "second")
    used = str(tmp_path / "used.crt"), str(tmp_path / "used.key")
    for source, target in zip(first, used):
        Path(target).write_bytes(Path(source).read_bytes())
    sock = create_server_socket("127.0.0.1", 0)
    port = sock.getsockname()[1]

    def name_served(authority: str) -> str:
        context = ssl.create_default_context(cafile=authority)
        with socket.create_connection(("127.0.0.1", port)) as raw:
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as wrapped:
                return wrapped.getpeercert()["subject"][0][0][1]

    async def talk() -> None:
        assert await asyncio.to_thread(name_served, first[0]) == "first"
        Path(used[0]).write_bytes(Path(second[0]).read_bytes())  # the pair does not fit for a moment
        await asyncio.sleep(0.05)
        assert await asyncio.to_thread(name_served, first[0]) == "first"
        Path(used[1]).write_bytes(Path(second[1]).read_bytes())
        for _ in range(500):
            await asyncio.sleep(0.01)
            with contextlib.suppress(ssl.SSLError):
                assert await asyncio.to_thread(name_served, second[0]) == "second"
                return
        raise AssertionError("the new certificate was never served")

    serve(api, sock, talk, ssl_certfile=used[0], ssl_keyfile=used[1], enable_ssl_refresh=True)


async def _raw(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    answer = b""
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(1 << 16):
            answer += chunk
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 11 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 200_000, 431),
        (b"GET /" + b"y" * 200_000, 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nconnection: close\r\nx: " + b"y" * 900 + b"\r\n\r\n", 200),
    ],
)
def test_a_requests_head_is_bounded(api: Api, data: bytes, status: int):
    sock = create_server_socket("127.0.0.1", 0)

    async def talk() -> None:
        answer = await asyncio.wait_for(_raw(sock.getsockname()[1], data), 20)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        if status != 200:
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == status

    serve(api, sock, talk, h11_max_incomplete_event_size=1000, h11_max_header_count=10)


def test_a_client_that_never_ends_its_head_is_cut_off(api: Api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.05)
    sock = create_server_socket("127.0.0.1", 0)

    async def talk() -> None:
        assert await asyncio.wait_for(_raw(sock.getsockname()[1], b"GET /health HTTP/1.1\r\n"), 20) == b""
        assert await asyncio.wait_for(_raw(sock.getsockname()[1], b""), 20) == b""

    serve(api, sock, talk)


def test_routes_hand_their_callers_trace_to_the_tracer(engine: FakeEngine):
    class Tracer:
        seen: list[tuple[str, dict]] = []

        def watched(self, request_id, params, headers, outputs):
            self.seen.append((request_id.split("-")[0], dict(headers)))
            return outputs

    api = Api(engine)
    for serving in (api.app.state.serving_completion, api.app.state.serving_chat):
        serving._settings.__dict__["tracer"] = Tracer()
    headers = {"traceparent": "00-1-2-01"}
    api.post("/v1/completions", {"prompt": "Hi"}, headers=headers)
    api.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}, headers=headers)
    assert Tracer.seen == [("cmpl", headers), ("chatcmpl", headers)]
