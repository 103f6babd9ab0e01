"""Several API servers on one socket and one engine core: they answer alike, count together, and end together.

The executor is a fake, which is quick to start: what is looked at is around it.
"""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.server import Server, serving

NUM_SERVERS = 3
ASK = {"prompt": [1, 2, 3], "max_tokens": 8, "seed": 1, "ignore_eos": True}


@pytest.fixture
def server(tiny_model: Path, short_path: Path):
    arguments = ["--api-server-count", str(NUM_SERVERS), "--max-model-len", "128"]
    arguments += ["--distributed-executor-backend", "tests.fakes:FakeExecutor"]
    with serving(tiny_model, *arguments, run_dir=short_path) as running:
        wait_listening(running)
        yield running


def further_servers(server: Server) -> list[psutil.Process]:
    """By their titles in the log."""
    pids = {int(pid) for pid in re.findall(r"\(APIServer_\d pid=(\d+)\)", server.text)}
    return [psutil.Process(pid) for pid in sorted(pids)]


def engine_core(server: Server) -> psutil.Process:
    """The first that was spawned. (API servers follow, and those that idle start what checks constraints.)"""
    children = psutil.Process(server.process.pid).children()
    spawned = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return min(spawned, key=psutil.Process.create_time)


def wait_listening(server: Server) -> None:
    """Until each has answered on a connection of its own: then all take part."""
    for _ in range(1200):
        if len([line for line in server.log if "Started server process" in line]) == NUM_SERVERS:
            server.children = psutil.Process(server.process.pid).children(recursive=True)
            return
        httpx.get(f"{server.url}/health", timeout=60)
        time.sleep(0.1)
    raise AssertionError("not every API server came up:\n" + server.text)


def test_they_answer_alike_count_together_and_end_together(server: Server):
    def ask(index: int) -> str:
        stream = index % 2 == 0
        with httpx.Client() as client:  # a connection of its own: any of the servers may take it
            body = {**ASK, "stream": stream, "return_token_ids": True, "request_id": f"same-{index % 3}"}
            answer = client.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            if stream:
                assert answer.text.endswith("data: [DONE]\n\n")
                return "stream"
            return str(answer.json()["choices"][0]["token_ids"])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(60)))
    assert len(set(answers)) == 2
    for _ in range(5):  # whichever server is asked
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        total = [value for name, value in lines.items() if name.startswith("vllm:generation_tokens_total")]
        assert total == ["480.0"]
        gaps = [v for name, v in lines.items() if name.startswith("vllm:inter_token_latency_seconds_count")]
        assert gaps == [str(60 * 7.0)]
    for _ in range(2 * NUM_SERVERS):  # a new connection each: the numbers are the core's, whoever tells them
        with httpx.stream("GET", f"{server.url}/playground/state", timeout=60) as stream:
            event = next(json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
        assert [engine["num_generation_tokens"] for engine in event["engines"]] == [480]
    logs = [line for line in server.log if "POST /v1/completions" in line]
    assert len(logs) == 60
    assert "(APIServer_1 " in server.text and "(APIServer_2 " in server.text
    assert server.stop() == 0
    assert server.leftovers() == []


def test_one_that_dies_ends_the_whole(server: Server):
    further_servers(server)[0].kill()
    assert server.wait_exit() == 1
    assert "API server" in server.log[-1] and "SIGKILL" in server.log[-1]
    assert server.leftovers() == []


def test_the_cores_death_ends_all(server: Server):
    core = engine_core(server)
    server.children = psutil.Process(server.process.pid).children(recursive=True)  # what checks constraints too
    core.kill()
    assert server.wait_exit() == 1
    assert server.leftovers() == []
