"""Where the kernels' threads may run, of the pool alone on a machine of up to eight processors that is made up."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
WRAPPED = ("sched_getcpu", "sched_getaffinity", "pthread_setaffinity_np")


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="NOT RUN: needs Linux and a C++ compiler")
def test_workers_keep_off_their_caller_and_follow_the_processors_there_are(tmp_path: Path):
    sources = [str(ROOT / "tests/ops/thread_places.cpp"), str(ROOT / "csrc/cpu/thread_pool.cpp")]
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    flags = ["-std=c++17", "-O1", "-pthread", f"-I{ROOT / 'csrc/cpu'}"]
    subprocess.run([COMPILER, *flags, *sources, *wraps, "-o", tmp_path / "places"], check=True)
    said = subprocess.run([tmp_path / "places"], check=True, capture_output=True, text=True, timeout=60).stdout
    assert said.splitlines() == [
        "room: 1 2 3",
        "moved: 0 1 3",
        "shrunk: 0 1",  # three workers, two processors: the system shares them out
        "grown: 1 2 3 4 5 6 7",
        "caller bound: 1 2 3 4 5 6 7",
        "refused: 1 2 3 4 5 6 7",
    ]
