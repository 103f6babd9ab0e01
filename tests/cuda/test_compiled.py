"""What nvcc makes of csrc/cuda, for every architecture that the wheel is built for. Runs nothing: that takes a card."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(
    NVCC is None, reason="NOT COMPILED: there is no nvcc, so csrc/cuda is not checked at all"
)
SOURCES = sorted(path.name for path in CUDA.glob("*.cu"))
PTX, ELF = 1, 2  # kinds of what a fat binary holds


class Compiled(NamedTuple):
    fatbin: bytes
    said: str  # by ptxas


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    directory = tmp_path_factory.mktemp("fatbin")
    targets = re.findall(r"-gencode=\S+?(?=[\s)])", (CUDA / "cuda.cmake").read_text())
    assert len(targets) == 3
    done = {}
    for name in SOURCES:
        fatbin = directory / f"{name}.fatbin"
        command = [
            NVCC,
            "-std=c++17",
            "-O3",
            "-Xptxas",
            "-v",
            "--threads=2",
            *targets,
            "--fatbin",
            name,
            "-o",
            str(fatbin),
        ]
        ran = subprocess.run(command, cwd=CUDA, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        done[name] = Compiled(fatbin.read_bytes(), ran.stdout + ran.stderr)
    return done


def entries_of(fatbin: bytes) -> list[tuple[int, int]]:
    """(kind, architecture) of each entry."""
    magic, _, header_bytes, size = struct.unpack_from("<IHHQ", fatbin)
    assert magic == 0xBA55ED50
    found, at = [], header_bytes
    while at < header_bytes + size:
        kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", fatbin, at)
        found.append((kind, struct.unpack_from("<I", fatbin, at + 28)[0]))
        at += entry_header + entry_size
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_a_fat_binary_holds_ampere_hopper_and_ptx_for_what_comes_after(compiled, name):
    assert sorted(entries_of(compiled[name].fatbin)) == [(PTX, 90), (ELF, 80), (ELF, 90)]
    assert set(re.findall(r"entry function '\S+' for '(\w+)'", compiled[name].said)) == {"sm_80", "sm_90a"}


@pytest.mark.parametrize("name", SOURCES)
def test_no_register_is_spilled(compiled, name):
    said = compiled[name].said
    functions = re.findall(r"entry function '(\S+)' for '(\w+)'", said)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(functions) == len(spills) > 0
    assert {(f, s) for f, s in zip(functions, spills) if s != ("0", "0", "0")} == set()


def test_nvcc_has_no_warning(compiled):
    assert {name: each.said for name, each in compiled.items() if "warning" in each.said} == {}
