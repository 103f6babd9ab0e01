"""The CUDA kernels as a library of CPU code: compiled once by the C++ compiler, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minivllm.ops import cuda

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


class EmulatedExtension:
    """`minivllm._cuda` with the kernels on fibers: csrc/cuda/bind.cpp in Python."""

    @staticmethod
    def decode_attention(
        out, q, cache, tables, parts, sinks, sizes, is_bf16, kv, strides, cache_strides, factors, stream
    ):
        numbers = (ctypes.c_int64 * 16)(*sizes, is_bf16, *strides, *cache_strides)
        addresses = map(ctypes.c_void_p, (out, q, cache, *tables, *parts, sinks))
        assert library().emulated_decode(*addresses, numbers, (ctypes.c_float * 3)(*factors), kv)

    @staticmethod
    def truncate(logits, top_k, top_p, min_p, row_stride, vocab_size, num_rows, stream):
        addresses = map(ctypes.c_void_p, (logits, top_k, top_p, min_p))
        is_by_cluster = num_rows == 1  # as where a card has more blocks than rows
        library().emulated_truncate(*addresses, ctypes.c_int64(row_stride), vocab_size, num_rows, is_by_cluster)

    @staticmethod
    def copy_blocks(sources, targets, num_layers, pairs, num_pairs, block_bytes, stream):
        sources, targets, pairs = map(ctypes.c_void_p, (sources, targets, pairs))
        library().emulated_copy_blocks(
            sources, targets, num_layers, pairs, num_pairs, ctypes.c_int64(block_bytes)
        )


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `minivllm.ops.cuda` call it, on tensors of a CPU."""
    monkeypatch.setattr(cuda, "extension", lambda: (EmulatedExtension, None))
    monkeypatch.setattr(cuda, "shared_bytes_of_card", lambda: 227 << 10)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
