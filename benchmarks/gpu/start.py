"""From a command to the first token: imports, processes, weights made up, kernels compiled or found on disk.

Each start is a process of its own, as a user begins it. Owns its time limit and its end; imports nothing of the engine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import Row

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
_LLM = """
import json, sys
from minivllm import LLM, SamplingParams
with LLM(sys.argv[1], **json.loads(sys.argv[2])) as llm:
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    llm.generate({"prompt_token_ids": json.loads(sys.argv[3])}, params, use_tqdm=False)
    print("FIRST TOKEN", flush=True)
"""
_SERVER_NEEDS = ("fastapi", "uvicorn", "pydantic")


def run(name: str, shape: dict, *, limit_s: Callable[[], float], **options: Any) -> Iterator[Row]:
    """An LLM whose kernels were never compiled, one that finds them on disk, and a server that does.

    limit_s: how long a start may take that begins now; options: fields of EngineArgs.
    """
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 16384} | options
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as kernels:
        (Path(directory) / "config.json").write_text(json.dumps(shape))
        for what, start in (
            ("LLM, kernels compiled", of_llm), ("LLM, kernels on disk", of_llm), ("server, kernels on disk", of_server),
        ):  # fmt: skip
            env = {**os.environ, "TRITON_CACHE_DIR": kernels}
            try:
                note = f"{start(directory, options, env, limit_s()):.1f} s; the aim: 20 s for 8B"
            except (RuntimeError, OSError) as error:
                note = f"not run: {error}"
            yield Row(f"{name} command to first token, {what}", "-", "-", note)


def of_llm(model: str, options: dict[str, Any], env: dict[str, str], limit_s: float) -> float:
    """Seconds until a script of five lines has its token."""
    command = [sys.executable, "-c", _LLM, model, json.dumps(options), json.dumps(PROMPT)]
    with _running(command, env, limit_s, subprocess.PIPE) as (child, begin, said):
        for line in child.stdout:
            if line.startswith("FIRST TOKEN"):
                return time.perf_counter() - begin
        raise RuntimeError(f"no token within {limit_s:.0f} s: {said()}")


def of_server(model: str, options: dict[str, Any], env: dict[str, str], limit_s: float) -> float:
    """Seconds until a client that asks from the beginning has its token."""
    if missing := [name for name in _SERVER_NEEDS if importlib.util.find_spec(name) is None]:
        raise RuntimeError(f"{', '.join(missing)} not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "minivllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 1, "ignore_eos": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with _running(command, env, limit_s) as (child, begin, said):
        while child.poll() is None:
            try:
                urllib.request.urlopen(request, timeout=limit_s).read()
                return time.perf_counter() - begin
            except urllib.error.HTTPError as error:
                if error.code != 503:  # which says that it starts
                    raise RuntimeError(error.read().decode()[-200:]) from None
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.02)
        raise RuntimeError(f"no token within {limit_s:.0f} s: {said()}")


@contextlib.contextmanager
def _running(
    command: list[str], env: dict[str, str], limit_s: float, stdout: int | None = None
) -> Iterator[tuple[subprocess.Popen, float, Callable[[], str]]]:
    """The process, when it began, and what it last said; after `limit_s`, or at the end, it and its own are ended."""
    with tempfile.TemporaryFile("w+") as log:
        begin = time.perf_counter()
        child = subprocess.Popen(
            command, env=env, stdout=stdout or log, stderr=log, text=True,
            cwd=Path(__file__).resolve().parents[2], start_new_session=True,
        )  # fmt: skip

        def said() -> str:
            log.seek(0)
            return (log.read().strip().splitlines() or ["it said nothing"])[-1][:160]

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

        limit = threading.Timer(limit_s, kill)
        limit.start()
        try:
            yield child, begin, said
        finally:
            limit.cancel()
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            kill()  # whatever is left of its session
            child.wait()
