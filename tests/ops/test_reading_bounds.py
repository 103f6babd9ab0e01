"""Products read nothing behind what they are given: each tensor ends where a page begins that cannot be read."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minivllm.ops import native
from minivllm.ops.kv_layout import KvLayout
from minivllm.ops.kv_write import KvPlace
from minivllm.ops.linear import PackedLinear
from minivllm.ops.linear_int4 import PackedInt4Linear
from minivllm.ops.linear_int8 import PackedInt8Linear
from minivllm.ops.op import OpSpec
from minivllm.ops.rms_norm import RowNorm
from minivllm.ops.rotary import HeadNorms, Turn

UNAVAILABLE = native.why_not(OpSpec("cpu", torch.float32))
ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS = (1, 5, 8, 9, 17, 40)


def at_the_end(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, behind which is a page that cannot be read."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    last_page = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(last_page), mmap.PAGESIZE, 0) == 0
    place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return place.view(tensor.shape).copy_(tensor)


def layer_of(cls, n, k, dtype, *, gated=False):
    layer = cls(n, k, dtype, gated=gated)
    layer.load_rows(0, torch.randn(n, k))
    layer._packed = at_the_end(layer._packed)
    return layer


def use(cls, dtype):
    """Every product of a layer, of some numbers of rows."""
    for k in (32, 100, 576):
        plain, gated = layer_of(cls, 96, k, dtype), layer_of(cls, 128, k, dtype, gated=True)
        narrow, down = layer_of(cls, 33, k, dtype), layer_of(cls, k, 64, dtype)
        norm, bias = RowNorm(at_the_end(torch.ones(k, dtype=dtype)), 1e-6), at_the_end(torch.randn(96).to(dtype))
        weight = at_the_end(torch.ones(16, dtype=dtype))
        for m in NUM_ROWS:
            x, out = at_the_end(torch.randn(m, k).to(dtype)), at_the_end(torch.zeros(m, 96, dtype=dtype))
            plain(x, bias, addend=at_the_end(torch.randn(m, 96)), out=out)
            plain(x, bias, norm=norm)
            narrow(x, out=at_the_end(torch.zeros(m, 33, dtype=dtype)))
            narrow.likeliest(x)
            gated.silu_mul(x, out=at_the_end(torch.zeros(m, 64, dtype=dtype)))
            gated.add_gated(x, x, down, norm=norm)
            layout = KvLayout("bfloat16", 2, 16, 32)  # 6 heads in all
            cache, slots = torch.zeros(layout.shape(2), dtype=torch.uint8), torch.arange(64 - m, 64)
            place = KvPlace(at_the_end(cache), at_the_end(slots), layout)
            positions, cos_sin = at_the_end(torch.arange(m)), at_the_end(torch.zeros(m, 16))
            plain.turn_and_write(x, bias, Turn(positions, cos_sin, HeadNorms(weight, weight, 1e-6)), place)


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
def test_products_read_nothing_behind_their_operands():
    command = [sys.executable, "-m", "tests.ops.test_reading_bounds"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"in {done.stdout.splitlines()[-1:]}: {done.returncode} {done.stderr}"


if __name__ == "__main__":
    for isa in native.lib.supported_isas():
        native.lib.set_isa(isa)
        for cls in (PackedLinear, PackedInt8Linear, PackedInt4Linear):
            for dtype in (torch.bfloat16, torch.float32):
                print(isa, cls.__name__, dtype, flush=True)
                use(cls, dtype)
