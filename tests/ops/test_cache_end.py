"""Kernels read a cache up to its end and no further: here the next page cannot be read, and to try ends the process."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import pathlib
import subprocess
import sys

import pytest
import torch

from minivllm.ops import native, paged_attention
from minivllm.ops.kv_layout import KV_TYPES, KvLayout
from minivllm.ops.paged_attention import Options

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are protected as Linux does it")
def test_attention_reads_nothing_behind_the_cache(isa):
    call = f"from tests.ops.test_cache_end import attend_at_the_end; attend_at_the_end({isa!r})"
    ended = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def attend_at_the_end(isa):
    """Decodes and a prompt whose first tokens lie in the cache's last block, for each type of cache."""
    native.lib.set_isa(isa)
    for kv_dtype, head_dim, kv_heads in itertools.product(KV_TYPES, [16, 48, 64, 80, 128], [1, 2]):
        layout = KvLayout(kv_dtype, kv_heads, head_dim, block_size=32)
        cache = zeros_at_the_end(layout.shape(5))
        table = torch.tensor([[4, 2, 1, 3, 0], [1, 4, 0, 0, 0], [0, 1, 2, 3, 4]], dtype=torch.int32)
        seq_lens = torch.tensor([160, 64, 160], dtype=torch.int32)
        starts = torch.tensor([0, 1, 2, 42], dtype=torch.int32)
        q = torch.randn(42, 2, head_dim).bfloat16()
        print(kv_dtype, head_dim, kv_heads, flush=True)
        paged_attention.cpu(
            q, cache, table, seq_lens, starts, layout=layout, options=Options(scale=head_dim**-0.5)
        )


def zeros_at_the_end(shape):
    """Bytes behind which lies a page that cannot be read."""
    size, page = torch.Size(shape).numel(), mmap.PAGESIZE
    whole = (size + page - 1) // page * page
    memory = mmap.mmap(-1, whole + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(memory, dtype=torch.uint8, offset=whole - size, count=size).view(shape)
