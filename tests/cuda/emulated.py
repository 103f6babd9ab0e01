"""The CUDA kernels as a library of CPU code: compiled once by the C++ compiler, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
KV_CODES = {"fp8_e4m3": 1, "int8": 2}  # csrc/cuda/decode_attention.h; else as the queries


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


@functools.cache
def library() -> ctypes.CDLL:
    directory = tempfile.mkdtemp(prefix="minivllm-emulated-")
    target = f"{directory}/kernels.so"
    here, kernels = ROOT / "tests" / "cuda", ROOT / "csrc" / "cuda"
    subprocess.run(
        [compiler(), "-std=c++17", "-O2", "-shared", "-fPIC", "-DMINIVLLM_EMULATE_CUDA", f"-I{here}", f"-I{kernels}",
         str(here / "emulated.cpp"), "-o", target],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(target)
    shutil.rmtree(directory)
    return loaded


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
