"""The HTTP server on a real socket: how it begins, and the ways it ends."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import shlex
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from minivllm.config.frontend import FrontendConfig
from minivllm.engine.async_llm import AsyncLLM
from minivllm.entrypoints.openai import api_server, app_state, launcher, middleware
from minivllm.entrypoints.openai.launcher import serve_http
from minivllm.exceptions import EngineDeadError
from tests.engine.engines import make_config
from tests.entrypoints.openai.conftest import Api, events
from tests.entrypoints.openai.fakes import FakeEngine, server_args

STREAM = {"prompt": "Hi", "stream": True, "max_tokens": 100}


def serve(
    api: Api, talk: Callable[[httpx.AsyncClient], Awaitable[None]], *, shutdown_timeout_s: float = 0
) -> None:
    """Serve the app, talk to it, and return once the server has ended by itself."""

    async def main() -> None:
        sock = api_server.create_server_socket("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        listening = asyncio.Event()
        server = asyncio.ensure_future(
            serve_http(
                api.app,
                sock,
                engine=api.engine,
                lifecycle=api.lifecycle,
                frontend=FrontendConfig(shutdown_timeout=shutdown_timeout_s, uvicorn_log_level="warning"),
                on_listening=listening.set,
            )
        )
        await asyncio.wait(
            [server, asyncio.ensure_future(listening.wait())], return_when=asyncio.FIRST_COMPLETED
        )
        async with httpx.AsyncClient(base_url=url) as client:
            await talk(client)
            await server
        assert sock.fileno() == -1

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(main())
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


async def open_streams(api: Api, client: httpx.AsyncClient, count: int) -> list[asyncio.Task[httpx.Response]]:
    """Streams that have started and hang after their first token."""
    api.engine.go_on.clear()
    streams = [asyncio.ensure_future(client.post("/v1/completions", json=STREAM)) for _ in range(count)]
    while api.engine.num_open < count:
        await asyncio.sleep(0.001)
    return streams


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_idle_server(api: Api, signum: signal.Signals):
    async def talk(client: httpx.AsyncClient) -> None:
        assert (await client.get("/health")).status_code == 200
        os.kill(os.getpid(), signum)

    serve(api, talk)


def test_a_signal_ends_open_streams_with_an_error_event(api: Api):
    async def talk(client: httpx.AsyncClient) -> None:
        streams = await open_streams(api, client, 4)
        os.kill(os.getpid(), signal.SIGTERM)
        for stream in streams:
            assert events((await stream).text)[-1]["error"]["code"] == 503

    serve(api, talk)


def test_with_a_shutdown_timeout_open_streams_finish(api: Api):
    async def talk(client: httpx.AsyncClient) -> None:
        (stream,) = await open_streams(api, client, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        while not api.lifecycle.draining:
            await asyncio.sleep(0.001)
        assert (await client.post("/v1/completions", json=STREAM)).status_code == 503
        api.engine.go_on.set()
        assert events((await stream).text)[-1]["choices"][0]["finish_reason"] == "stop"

    serve(api, talk, shutdown_timeout_s=60)


def test_a_second_signal_does_not_wait(api: Api):
    async def talk(client: httpx.AsyncClient) -> None:
        (stream,) = await open_streams(api, client, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        while not api.lifecycle.draining:
            await asyncio.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        assert "error" in events((await stream).text)[-1]

    serve(api, talk, shutdown_timeout_s=3600)


def test_the_engines_death_answers_everyone_and_ends_the_server_with_its_cause(api: Api):
    async def talk(client: httpx.AsyncClient) -> None:
        streams = await open_streams(api, client, 3)
        api.engine.die()
        for stream in streams:
            assert "SIGKILL" in events((await stream).text)[-1]["error"]["message"]

    with pytest.raises(EngineDeadError, match="SIGKILL"):
        serve(api, talk)


def test_an_engine_that_dies_idle_ends_the_server_too(api: Api):
    async def talk(_client: httpx.AsyncClient) -> None:
        api.engine.die()

    with pytest.raises(EngineDeadError):
        serve(api, talk)


def test_after_the_engines_death_there_is_time_to_see_503_at_health(api: Api):
    async def talk(client: httpx.AsyncClient) -> None:
        api.engine.die()
        await asyncio.sleep(launcher.ANSWER_DEATH_S / 2)
        assert (await client.get("/health")).status_code == 503

    with pytest.raises(EngineDeadError):
        serve(api, talk)


def test_a_server_that_ends_drops_the_texts_that_wait_for_the_tokenizer(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    release, begun, encoded = threading.Event(), threading.Event(), []

    def encode(text: str, **_options: object) -> list[int]:
        begun.set()
        assert release.wait(60)
        encoded.append(text)
        return [1]

    @contextlib.asynccontextmanager
    async def fake_client(_args: object, _stats: object, *, meanwhile: Callable[[], None]):
        meanwhile()
        yield engine

    async def serve_three_texts(app, _sock, **_options: object) -> None:
        waiting.extend(asyncio.ensure_future(app.state.renderer.encode(text)) for text in ("a", "b", "c"))
        while not begun.is_set():
            await asyncio.sleep(0.001)

    async def main() -> None:
        await api_server.run_server_worker("", None, server_args())
        release.set()
        await asyncio.wait(waiting)

    waiting: list[asyncio.Future[list[int]]] = []
    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    monkeypatch.setattr(api_server, "build_async_engine_client", fake_client)
    monkeypatch.setattr(launcher, "serve_http", serve_three_texts)
    asyncio.run(main())
    assert encoded == ["a"]


def test_a_signal_during_the_start_ends_the_core_and_nobody_else():
    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    bystander.start()

    def start() -> AsyncLLM:
        config = make_config("tests.engine.engines:EndlessStartExecutor")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return AsyncLLM.from_engine_config(config)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            asyncio.run(api_server._start_unless_signalled(start))
        assert ended.value.code == 128 + signal.SIGTERM
        assert multiprocessing.active_children() == [bystander]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        bystander.kill()
        bystander.join()


def test_a_connection_outlives_a_failure_nobody_expected(api: Api):
    """Both requests go over one connection, which a client would otherwise lose in the middle of the second."""

    async def talk(client: httpx.AsyncClient) -> None:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        body = b'{"prompt": "Hi"}'
        headers = ("Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}")
        head = "\r\n".join(["POST /v1/completions HTTP/1.1", *headers, "", ""]).encode()
        for fail_after, status in ((0, b"500"), (None, b"200")):
            api.engine.fail_after, api.engine.failure = fail_after, KeyError("secret")
            writer.write(head + body)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            assert answer.split()[1] == status
            (length,) = [line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length")]
            await reader.readexactly(int(length.split(b":")[1]))
        writer.close()
        os.kill(os.getpid(), signal.SIGTERM)

    serve(api, talk)


def test_a_client_hears_that_its_body_is_too_large(api: Api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(middleware, "MAX_BODY_BYTES", 1 << 20)

    async def talk(client: httpx.AsyncClient) -> None:
        response = await client.post("/v1/completions", json={"prompt": "x" * (2 << 20)})
        assert (response.status_code, response.json()["error"]["code"]) == (413, 413)
        assert (await client.get("/health")).status_code == 200
        os.kill(os.getpid(), signal.SIGTERM)

    serve(api, talk)


def test_the_curl_line_names_the_server_and_the_model(engine: FakeEngine, capsys: pytest.CaptureFixture):
    api = Api(engine)
    api_server._announce(engine, api.app, "http://127.0.0.1:8000", FrontendConfig(api_key=["k"]))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "curl" in line]
    words = shlex.split(line.split("try", 1)[1])
    assert "http://127.0.0.1:8000/v1/chat/completions" in words
    assert "Authorization: Bearer $MINIVLLM_API_KEY" in words
    body = words[words.index("-d") + 1].encode()
    response = api.request(
        "POST", "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 200


def test_a_chat_template_is_a_file_or_the_text_itself(tmp_path: Path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    assert app_state.read_chat_template(str(path)) == app_state.read_chat_template("{{ messages }}")
    assert app_state.read_chat_template(None) is None


@pytest.mark.parametrize(
    ("args", "loud"),
    [
        ({"host": None}, True),
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "api_key": ["k"]}, False),
        ({"host": "127.0.0.1"}, False),
    ],
)
def test_listening_everywhere_without_a_key_is_said_loudly(
    args: dict, loud: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # The socket is a loopback one all the same: a test opens nothing to the network.
    monkeypatch.setattr(
        api_server,
        "create_server_socket",
        lambda host, port, make=api_server.create_server_socket: make("127.0.0.1", 0),
    )
    monkeypatch.setattr(api_server.logger.parent, "propagate", True)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        url, sock = api_server.setup_server(server_args(**args))
        sock.close()
        exits: list[int] = []
        monkeypatch.setattr(os, "_exit", exits.append)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert exits == [128 + signal.SIGTERM]
    assert url.startswith("http://127.0.0.1:")
    assert any("ALL INTERFACES" in message for message in caplog.messages) == loud
