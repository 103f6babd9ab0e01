"""How each engine is started for a comparison: ours, and the peers somebody installed and names.

Knows the commands and nothing of loads. A peer is there when its variable (or compare.py's option) names it:
VLLM_PYTHON the Python of an environment with vLLM, LLAMA_SERVER the llama-server binary, OPENVINO_PYTHON the Python of
one with OpenVINO GenAI (offline only; it wants the model in its own format, --openvino-dir). GGUF files are looked for
beside the model: <model>-bf16.gguf, <model>-q8_0.gguf, or in --gguf-dir under the model's name.
"""

from __future__ import annotations

import glob
import json
import os
import select
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from processes import Guard, Processes
from works import Work

HOST = "127.0.0.1"
KV_GIB = 3  # W2 fills 2.6 of them in bf16
OFFLINE = str(Path(__file__).with_name("offline.py"))


@dataclass(frozen=True)
class Share:
    """What a slow engine is asked of a load: so many of its requests, at most so many runs. None: all."""

    requests: int | None = None
    runs: int | None = None


@dataclass(frozen=True)
class Peer:
    """One engine.

    server: the command that serves some works, without host and port. offline: the command that runs batches, without
    `--listen`. stays: it starts too slowly, or is too much ours, to be ended after each turn. by_server: what others do
    offline, it does through its server.
    """

    name: str
    server: Callable[[list[Work]], list[str]] | None = None
    offline: list[str] | None = None
    env: dict[str, str] = field(default_factory=dict)
    stays: bool = False
    by_server: bool = False
    shares: dict[str, Share] = field(default_factory=dict)


def ours(model: Path, extra: dict[str, str], name: str = "ours", kv_gib: float = KV_GIB) -> Peer:
    extra = {"kv_cache_memory_bytes": str(int(kv_gib * 2**30))} | extra
    server = [sys.executable, "-m", "minivllm.entrypoints.openai.api_server", "--model", str(model)]
    server += ["--max-model-len", max_len(model), "--touch-kv-cache"]  # as vLLM does
    for option, value in extra.items():
        server += [f"--{option.replace('_', '-')}", value]
    offline = [sys.executable, OFFLINE, "--engine", "minivllm", "--model", str(model), "--extra", json.dumps(extra)]
    return Peer(name, lambda works: server, offline, stays=True)


def ours_int8(model: Path) -> Peer:
    """Weights and cache; half the bytes of cache for as many tokens."""
    return ours(model, {"quantization": "int8", "kv_cache_dtype": "int8"}, "ours-int8", KV_GIB / 2)


def ours_int4(model: Path) -> Peer:
    """The same with weights of 4 bits."""
    return ours(model, {"quantization": "int4", "kv_cache_dtype": "int8"}, "ours-int4", KV_GIB / 2)


def why_ours_is_slow() -> str | None:
    """Why what `ours` starts would compute with torch's references, or None.

    What a server imports depends on where it is started: a source tree there comes before what is installed.
    """
    say = "import minivllm; from minivllm.utils.native import unavailable as why; "
    say += "print(minivllm.__path__[0], why or '', sep='\\n')"
    for directory in (Path.cwd(), Path(__file__).parent):  # a server's, and offline.py's
        found = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, cwd=directory)
        if found.returncode:
            return f"minivllm cannot be imported in {directory}: {found.stderr.strip().splitlines()[-1]}"
        package, why = found.stdout.split("\n")[:2]
        if why:
            return f"what {directory} imports as minivllm, {package}, has no kernels: {why}"
    return None


def vllm(model: Path, python: str) -> Peer:
    """One process for all cores: by default vLLM keeps one of two for itself."""
    libraries = glob.glob(f"{sys_prefix(python)}/lib/libiomp5.so")
    libraries += glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4")
    server = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "bfloat16"]
    server += ["--max-model-len", max_len(model)]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(libraries),
        "PYTHONPATH": "",  # ours is none of its business
    }
    offline = [python, OFFLINE, "--engine", "vllm", "--model", str(model)]
    return Peer("vllm", lambda works: server, offline, env, stays=True)


def max_len(model: Path) -> str:
    """As long as the loads need, or the model allows."""
    return str(min(8192, json.loads((model / "config.json").read_text())["max_position_embeddings"]))


def sys_prefix(python: str) -> str:
    return str(Path(python).parent.parent)


def llama(binary: str, gguf: Path, name: str) -> Peer:
    """Its context is divided among its slots, so it is started for one load."""

    def server(works: list[Work]) -> list[str]:
        streams = max(work.streams for work in works)
        context = streams * (max(work.num_tokens for work in works) + 64)
        sizes = ["-c", str(context), "-np", str(streams), "-t", str(os.cpu_count()), "--no-kv-unified"]
        return [binary, "-m", str(gguf), *sizes, "--cache-ram", "0"]

    once = {"W2": Share(8, 1), "W3": Share(1, 1), "W4": Share(4, 1), "W5": Share(16, 1), "T64": Share(128)}
    return Peer(name, server, by_server=True, shares=once)


def transformers(model: Path) -> Peer:
    shares = {"W1": Share(1, 1), "W2": Share(16, 1), "W3": Share(1, 1), "W4": Share(4, 1)}
    command = [sys.executable, OFFLINE, "--engine", "transformers", "--model", str(model)]
    return Peer("transformers", None, command, shares=shares)


def openvino(model: Path, python: str) -> Peer:
    """model: what `optimum-cli export openvino` made."""
    shares = {"W1": Share(1, 1), "W2": Share(32, 1), "W3": Share(1, 2), "W4": Share(8, 1)}
    command = [python, OFFLINE, "--engine", "openvino", "--model", str(model)]
    return Peer("openvino", None, command, {"PYTHONPATH": ""}, shares=shares)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


class Server:
    """A running server of a peer."""

    def __init__(
        self,
        peer: Peer,
        works: list[Work],
        log: Path,
        *,
        guard: Guard | None = None,
        limit_s: float = 600.0,
    ) -> None:
        """Raises RuntimeError when it ends before it serves, or does not serve in `limit_s`."""
        self.port = free_port()
        command = [*peer.server(works), "--host", HOST, "--port", str(self.port)]
        began = time.monotonic()
        self.processes = Processes(command, peer.env, log, guard=guard)
        try:
            while not is_up(self.port):
                if (code := self.processes.root.poll()) is not None:
                    raise RuntimeError(f"{peer.name} ended with {code} at its start; see {log}")
                if time.monotonic() - began > limit_s:
                    raise RuntimeError(f"{peer.name} did not serve in {limit_s:.0f} s; see {log}")
                time.sleep(0.02)
        except BaseException:
            self.processes.end()
            raise
        self.seconds_to_ready = time.monotonic() - began


class Offline:
    """A running offline.py of a peer, which has loaded its model and waits for works."""

    def __init__(self, peer: Peer, log: Path, *, guard: Guard | None = None, limit_s: float = 600.0) -> None:
        """Raises RuntimeError as Server does."""
        self._name, self._log = peer.name, log
        self.processes = Processes([*peer.offline, "--listen"], peer.env, log, guard=guard, talks=True)
        try:
            self.seconds_to_ready = self._answer(limit_s)["ready"]
        except BaseException:
            self.processes.end()
            raise

    def run(self, name: str, requests: int | None, limit_s: float) -> dict:
        """Raises RuntimeError when it ends, or is not done in `limit_s`: it is of no use then."""
        self.processes.root.stdin.write(json.dumps({"work": name, "requests": requests}).encode() + b"\n")
        self.processes.root.stdin.flush()
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> dict:
        out = self.processes.root.stdout
        if not select.select([out], [], [], limit_s)[0]:
            raise RuntimeError(f"{self._name} was not done in {limit_s:.0f} s")
        line = out.readline()  # it writes whole lines
        if not line:
            raise RuntimeError(f"{self._name} ended with {self.processes.root.wait()}; see {self._log}")
        return json.loads(line)
