"""`minivllm collect-env`: what to paste into a bug report.

Owns the report only. Imports neither torch nor anything else it reports on, but for our own extension. Of the
environment it shows only the variables in `envs.VARIABLES`, and of a key only that it is set.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from minivllm import envs
from minivllm.version import __version__

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "msgspec",
    "pyzmq", "fastapi", "starlette", "uvicorn", "uvloop", "pydantic", "prometheus-client", "ray",
)  # fmt: skip
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
GIB = 1 << 30

Section = dict[str, str]


def collect() -> dict[str, Section]:
    """The report: sections, each of names and values. What cannot be told says why."""
    return {
        "minivllm": {"version": __version__, "native extension": _native()},
        "system": {
            "platform": platform.platform(),
            "python": sys.version.replace("\n", ""),
            "C++ compiler": _first_line("c++", "--version"),
        },
        "processor": {
            "model": _processor(),
            "usable processors": f"{_num_usable_processors()} of {os.cpu_count()}",
            "memory": _memory(),
        },
        "accelerators": {"NVIDIA": _first_line(*GPU_QUERY)},
        "packages": {name: _package(name) for name in PACKAGES},
        "environment": {name: _variable(name) for name in envs.VARIABLES},
    }


def render(report: dict[str, Section]) -> str:
    """The report as text, one aligned block a section."""
    blocks = []
    for title, section in report.items():
        width = max(map(len, section))
        blocks.append("\n".join([title] + [f"  {name:<{width}}  {value}" for name, value in section.items()]))
    return "\n\n".join(blocks)


def main() -> None:
    print(render(collect()))


def _native() -> str:
    from minivllm.utils.native import lib, unavailable

    if lib is None:
        return unavailable
    return f"{lib.isa()} of {', '.join(lib.supported_isas())}; {lib.num_threads()} threads"


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        return "not set"
    return "set" if "KEY" in name else value


def _num_usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    """Physical memory and, where one is set, the control group's limit, in GiB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [line.strip() for line in _lines("/sys/fs/cgroup/memory.max")]
    limit = f", limited to {int(limits[0]) / GIB:.1f} GiB" if limits and limits[0].isdigit() else ""
    return f"{total / GIB:.1f} GiB{limit}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _first_line(*command: str) -> str:
    """The first line a command prints; it gets five seconds."""
    if shutil.which(command[0]) is None:
        return "not found"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed ({type(error).__name__})"
    return next(iter(done.stdout.splitlines()), f"exit code {done.returncode}")


if __name__ == "__main__":
    main()
