"""A real server in a process of its own, watched from outside as a user or a supervisor would."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120  # generous: CI machines stall; the figures users care about are in benchmarks/


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`python -m minivllm.entrypoints.openai.api_server …` with its log, its process tree and its traces on disk."""

    def __init__(
        self, model: Path | None, *args: str, run_dir: Path, port: int | None = None, wait: bool = True
    ) -> None:
        """model: None for the model in the box."""
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.run_dir = run_dir
        self.log: list[str] = []
        command = [sys.executable, "-m", "minivllm.entrypoints.openai.api_server"]
        command += ["--model", str(model)] if model is not None else []
        command += ["--host", "127.0.0.1", "--port", str(self.port), *args]
        env = {**os.environ, "MINIVLLM_RUN_DIR": str(run_dir), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.children: list[psutil.Process] = []
        if wait:
            self.wait_ready()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line.rstrip("\n"))

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self._reader.join(5)
                raise AssertionError(f"the server exited with {self.process.returncode}:\n" + self.text)
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    self.children = psutil.Process(self.process.pid).children(recursive=True)
                    return
            time.sleep(0.05)
        raise AssertionError("the server did not come up:\n" + self.text)

    @property
    def text(self) -> str:
        return "\n".join(self.log)

    @property
    def core(self) -> psutil.Process:
        """The engine core's process: the child that maps libtorch."""
        for child in psutil.Process(self.process.pid).children(recursive=False):
            with contextlib.suppress(psutil.Error):
                if any("libtorch" in m.path for m in child.memory_maps()):
                    return child
        raise AssertionError("no child process has torch loaded")

    def wait_exit(self, timeout_s: float = 30) -> int:
        """Wait for the server to end by itself; its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        return code

    def leftovers(self, timeout_s: float = 30) -> list[str]:
        """What outlives the server: its children, its socket directories."""
        assert "is too long for a socket path" not in self.text  # then they were not made where we look
        _, alive = psutil.wait_procs(self.children, timeout=timeout_s)
        left = [f"process {p.pid} {' '.join(p.cmdline())[:120]}" for p in alive if p.status() != psutil.STATUS_ZOMBIE]
        return left + [f"file {path}" for path in self.run_dir.rglob("*")]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait_exit(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextlib.contextmanager
def serving(model: Path | None, *args: str, run_dir: Path, **kwargs) -> Iterator[Server]:
    """A server that is stopped at the end, whatever happens."""
    server = Server(model, *args, run_dir=run_dir, **kwargs)
    try:
        yield server
    finally:
        server.stop()
