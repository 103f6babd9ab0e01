"""Where the time of a first token goes: one request behind many decoded tokens, by time stamps in both processes.

    python benchmarks/first_token.py --model DIR [--requests 21] [--num-in 128] [--num-out 128] [--rest 0] [-- OPTIONS]

The server is ours with a clock around the functions in MARKS, in the API process and in the core; requests come one
after another, as W1's do, each of `--num-out` tokens, so that whatever a first token needs has not been used for
seconds. CLOCK_MONOTONIC is one clock for all processes. Told are medians of the milliseconds from each mark to the
next, and least and most; the first request is left out. OPTIONS go to the server.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import peers

now = time.monotonic_ns
# Where a request passes, in its order: the process, the module, the function, and whether its begin or its end.
MARKS = [
    ("api", "minivllm.entrypoints.openai.http_protocol", "LimitedProtocol.connection_made", "begin"),
    ("api", "minivllm.entrypoints.openai.http_protocol", "LimitedProtocol.data_received", "begin"),
    ("api", "minivllm.entrypoints.openai.short_way", "ShortWay.__call__", "begin"),
    ("api", "minivllm.entrypoints.openai.completion.serving", "ServingCompletion.create", "begin"),
    ("api", "minivllm.engine.processor", "Processor.process_inputs", "begin"),
    ("api", "minivllm.engine.core_client", "AsyncMPClient.add_request", "begin"),
    ("api", "minivllm.engine.core_launcher", "CoreProcess.send", "begin"),
    ("api", "minivllm.engine.core_launcher", "CoreProcess.send", "end"),
    ("core", "minivllm.engine.core_process", "_CoreProcess._add", "begin"),
    ("core", "minivllm.engine.core", "EngineCore.step", "begin"),
    ("core", "minivllm.worker.model_runner", "ModelRunner.execute_model", "begin"),
    ("core", "minivllm.worker.graphs", "RecordedStep.run", "begin"),
    ("core", "minivllm.ops.recording", "Recording.replay", "begin"),
    ("core", "minivllm.ops.recording", "Recording.replay", "end"),
    ("core", "minivllm.worker.model_runner", "ModelRunner.sample_tokens", "begin"),
    ("core", "minivllm.models.decoder", "DecoderForCausalLM.likeliest", "begin"),
    ("core", "minivllm.models.decoder", "DecoderForCausalLM.likeliest", "end"),
    ("core", "minivllm.worker.model_runner", "ModelRunner.sample_tokens", "end"),
    ("core", "minivllm.engine.core_process", "_CoreProcess._send", "begin"),
    ("core", "minivllm.engine.core_process", "_CoreProcess._send", "end"),
    ("api", "minivllm.engine.core_client", "AsyncMPClient._on_readable", "begin"),
    ("api", "minivllm.engine.output_processor", "OutputProcessor.process_outputs", "begin"),
    ("api", "minivllm.entrypoints.openai.sse", "EventStream.__call__", "begin"),
    ("api", "minivllm.entrypoints.openai.http_protocol", "_HeadHolder._flush", "end"),
]
_written: list[tuple[int, int]] = []  # mark, when; of this process


def marked(process: str) -> None:
    """Put the clock around this process's functions."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for number, (where, module, function, edge) in enumerate(MARKS):
        if where == process:
            found.setdefault((module, function), {})[edge] = number
    for (module, function), edges in found.items():
        owner: Any = import_module(module)
        *path, name = function.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, _timed(getattr(owner, name), edges.get("begin"), edges.get("end")))


def _timed(call: Callable[..., Any], begin: int | None, end: int | None) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if begin is not None:
            _written.append((begin, now()))
        result = call(*args, **kwargs)
        if end is not None:
            _written.append((end, now()))
        return result

    return timed


def _tell(process: str) -> None:
    Path(os.environ["FIRST_TOKEN_MARKS"], process).write_text(json.dumps(_written))


def run_engine_core(*args: Any) -> None:
    """The core's entry point, with the clock; of a module of its own, which the child imports."""
    from minivllm.engine import core_process

    start = core_process._CoreProcess._start

    def started(process: Any) -> Any:
        core = start(process)
        marked("core")
        return core

    core_process._CoreProcess._start = started
    try:
        core_process.run_engine_core(*args)
    finally:
        _tell("core")


def serve(options: list[str]) -> None:
    from minivllm.engine import core_launcher
    from minivllm.entrypoints.openai import api_server

    core_launcher.run_engine_core = run_engine_core
    marked("api")
    try:
        api_server.main(options)
    finally:
        _tell("api")


def ask(port: int, model: str, prompt: list[int], num_out: int) -> tuple[int, int, int]:
    """When it connected, when the request was sent, and when the first event came; returns after the last."""
    body = {"model": model, "prompt": prompt, "max_tokens": num_out, "temperature": 0.0, "ignore_eos": True}
    content = json.dumps(body | {"stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    began = now()
    with socket.create_connection((peers.HOST, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request)
        sent = now()
        first, seen = 0, b""
        while data := connection.recv(65536):
            seen += data
            if not first and b"data: {" in seen:
                first = now()
    return began, sent, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=21)
    parser.add_argument("--num-in", type=int, default=128)
    parser.add_argument("--num-out", type=int, default=128)
    parser.add_argument("--rest", type=float, default=0.0, help="seconds before each request")
    parser.add_argument("options", nargs="*", help="of the server")
    args = parser.parse_args()
    port = peers.free_port()
    server = peers.ours(args.model, {}).server([])
    command = [server[0], __file__, "--serve", *server[3:], *args.options, "--port", str(port), "--host", peers.HOST]
    with tempfile.TemporaryDirectory() as marks:
        with open(Path(marks, "log"), "wb") as log:
            process = subprocess.Popen(command, env=os.environ | {"FIRST_TOKEN_MARKS": marks}, stdout=log, stderr=log)
        try:
            _wait(process, port, Path(marks, "log"))
            clients = _ask_all(args, port)
        finally:
            process.terminate()
            process.wait()
        written = [tuple(mark) for name in ("api", "core") for mark in json.loads(Path(marks, name).read_text())]
    _show(clients, sorted(written, key=lambda mark: mark[1]))


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{peers.HOST}:{port}/health"):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(log.read_text())


def _ask_all(args: argparse.Namespace, port: int) -> list[tuple[int, int, int]]:
    pick = random.Random(0)
    clients = []
    for _ in range(args.requests + 1):
        time.sleep(args.rest)
        prompt = [pick.randrange(300, 30000) for _ in range(args.num_in)]
        clients.append(ask(port, str(args.model), prompt, args.num_out))
    return clients[1:]


def _show(clients: list[tuple[int, int, int]], written: list[tuple[int, int]]) -> None:
    """Of each mark the first time in a request that comes after the mark before it."""
    names = ["client connects", "client has sent", *(f"{m[0]:4} {m[2]} {m[3]}" for m in MARKS), "client has the token"]
    rows = []
    for began, sent, first in clients:
        times = [began, sent]
        last = began
        for number in range(len(MARKS)):
            last = next((when for mark, when in written if mark == number and last <= when <= first), last)
            times.append(last)
        rows.append([*times, first])
    print(f"{'ms since':>8} {'least':>7} {'most':>7} {'at':>7}")
    for i, name in enumerate(names):
        since = [(row[i] - row[i - 1 if i != 2 else 0]) / 1e6 if i else 0.0 for row in rows]
        at = statistics.median((row[i] - row[0]) / 1e6 for row in rows)
        print(f"{statistics.median(since):8.2f} {min(since):7.2f} {max(since):7.2f} {at:7.2f}  {name}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        import first_token  # this file, as the core's process finds it

        first_token.serve(sys.argv[2:])
    else:
        main()
