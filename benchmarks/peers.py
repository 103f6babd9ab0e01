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
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HOST = "127.0.0.1"
KV_GIB = 4


@dataclass(frozen=True)
class Peer:
    """One engine. `server`: a command that serves `{port}`; `offline`: the Python that runs benchmarks/offline.py."""

    name: str
    server: list[str] | None = None
    offline: list[str] | None = None
    env: dict[str, str] = field(default_factory=dict)


def ours(model: Path, extra: list[str], name: str = "ours") -> Peer:
    server = [sys.executable, "-m", "minivllm.entrypoints.openai.api_server", "--model", str(model)]
    server += ["--max-model-len", max_len(model), "--kv-cache-memory-bytes", str(KV_GIB << 30)]
    server += ["--touch-kv-cache"]  # as vLLM does
    return Peer(name, [*server, *extra], [sys.executable])


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
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(libraries),
        "PYTHONPATH": "",  # ours is none of its business
    }
    return Peer("vllm", [*server, "--max-model-len", max_len(model)], [python], env)


def max_len(model: Path) -> str:
    """As long as the loads need, or the model allows."""
    return str(min(8192, json.loads((model / "config.json").read_text())["max_position_embeddings"]))


def sys_prefix(python: str) -> str:
    return str(Path(python).parent.parent)


def llama(binary: str, gguf: Path, streams: int, name: str) -> Peer:
    server = [binary, "-m", str(gguf), "-c", str(512 * streams), "-np", str(streams), "-t", str(os.cpu_count())]
    return Peer(name, [*server, "--cache-ram", "0"])


def transformers() -> Peer:
    return Peer("transformers", None, [sys.executable])


def openvino(python: str) -> Peer:
    return Peer("openvino", None, [python], {"PYTHONPATH": ""})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://{HOST}:{port}/health").status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


class Server:
    """A running server of a peer. Use as a context, or `end` it: its children end with it."""

    def __init__(self, peer: Peer, port: int, log: Path) -> None:
        """Raises RuntimeError when it ends before it serves."""
        self.port = port
        command = [*peer.server, "--host", HOST, "--port", str(port)]
        began = time.monotonic()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, env=os.environ | peer.env, start_new_session=True
            )
        while not is_up(port):
            if self._process.poll() is not None:
                raise RuntimeError(f"{peer.name} ended with {self._process.returncode}; see {log}")
            time.sleep(0.02)
        self.seconds_to_ready = time.monotonic() - began

    def _processes(self) -> list[psutil.Process]:
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def memory_mb(self) -> float:
        """Proportional set size of all its processes."""
        return sum(process.memory_full_info().pss for process in self._processes()) / 1e6

    def cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes())

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def end(self) -> None:
        processes = self._processes()
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            pass
        for process in processes:
            if process.is_running():
                process.kill()
