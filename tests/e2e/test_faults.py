"""Plugs pulled: whoever dies, every client is answered and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.server import Server

ARGS = ["--served-model-name", "tiny", "--max-model-len", "32768", "--kv-cache-memory-bytes", "256Mi"]
ENDLESS = {"model": "tiny", "prompt": "go", "max_tokens": 30_000, "ignore_eos": True, "stream": True}


class Stream(threading.Thread):
    """One open stream, and how it ended."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.url = f"{server.url}/v1/completions"
        self.events: list[str] = []
        self.started = threading.Event()
        self.ended_at: float | None = None
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=ENDLESS, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
                        self.started.set()
        except httpx.TransportError as error:
            self.failure = error
        self.ended_at = time.monotonic()

    @property
    def ended_properly(self) -> bool:
        """A finish or an error event, then [DONE]."""
        if self.failure is not None or len(self.events) < 2 or self.events[-1] != "[DONE]":
            return False
        last = json.loads(self.events[-2])
        return "error" in last or last["choices"][0]["finish_reason"] is not None


def open_streams(server: Server, count: int) -> list[Stream]:
    streams = [Stream(server) for _ in range(count)]
    for stream in streams:
        assert stream.started.wait(60)
    return streams


@pytest.fixture
def fragile(tiny_model_long: Path, short_path: Path):
    server = Server(tiny_model_long, *ARGS, run_dir=short_path)
    yield server
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(server.process.pid), *server.children]:
            process.kill()


@pytest.fixture(scope="session")
def tiny_model_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from make_random_model import make_model

    return make_model(tmp_path_factory.mktemp("models") / "tiny-long", max_position_embeddings=32768, seed=2)


def test_kill_9_of_the_engine_core_answers_every_client_and_exits_with_a_message(fragile: Server):
    streams = open_streams(fragile, 8)
    killed_at = time.monotonic()
    os.kill(fragile.core.pid, signal.SIGKILL)
    statuses = []
    with httpx.Client(base_url=fragile.url, timeout=5) as client:
        while fragile.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                statuses.append(client.get("/health").status_code)
            assert time.monotonic() < killed_at + 30
    assert fragile.wait_exit() not in (0, None)
    for stream in streams:
        stream.join(60)
        assert stream.ended_properly, (stream.events[-2:], stream.failure)
        assert "error" in json.loads(stream.events[-2])
    # 200 only until the server knows, then 503 until it exits.
    assert 503 in statuses
    assert set(statuses[statuses.index(503) :]) == {503}
    assert "SIGKILL" in fragile.log[-1] or "signal 9" in fragile.log[-1]
    assert fragile.leftovers() == []


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("num_streams", [0, 16])
def test_a_signal_ends_every_stream_and_exits_cleanly(fragile: Server, signal_sent: signal.Signals, num_streams: int):
    streams = open_streams(fragile, num_streams)
    fragile.process.send_signal(signal_sent)
    assert fragile.wait_exit(30) == 0
    for stream in streams:
        stream.join(60)
        assert stream.ended_properly, (stream.events[-2:], stream.failure)
    assert fragile.leftovers() == []
    assert not any("Traceback" in line for line in fragile.log), fragile.text


def test_kill_9_of_the_api_server_takes_the_core_along(fragile: Server):
    open_streams(fragile, 4)
    os.kill(fragile.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(fragile.children, timeout=30)
    assert alive == []


def test_a_client_that_leaves_frees_its_place(fragile: Server):
    for _ in range(5):
        with httpx.stream("POST", f"{fragile.url}/v1/completions", json=ENDLESS, timeout=60) as response:
            next(response.iter_lines())
    deadline = time.monotonic() + 60
    while _running(text := httpx.get(f"{fragile.url}/metrics", timeout=60).text):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)


def _running(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")]
    return sum(float(line.split()[-1]) for line in lines) if lines else 1  # not said yet


def test_a_signal_while_the_model_loads_leaves_nothing(tiny_model: Path, short_path: Path):
    server = Server(tiny_model, *ARGS, "--max-model-len", "512", run_dir=short_path, wait=False)
    while not psutil.Process(server.process.pid).children():
        time.sleep(0.01)
    server.children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGINT)
    assert server.wait_exit(30) == 130
    assert server.leftovers() == []
