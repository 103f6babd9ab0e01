"""Masking logits by bits: what a grammar allows, one row of bits for each row that has one."""

from __future__ import annotations

import numpy as np
import torch

from minivllm.ops import gpu, native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op, OpSpec


def reference(logits: torch.Tensor, rows: np.ndarray, bitmask: np.ndarray) -> None:
    """Mask to -inf, in place, the tokens of some rows whose bit is 0.

    logits: [num_rows, vocab_size] float32; rows: [K] int64, distinct; bitmask: [K, W] uint32 with
    32 * W >= vocab_size: bit t % 32 of word t // 32 is token t's. Other rows stay as they are.
    """
    bits = np.unpackbits(bitmask.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    masked = torch.from_numpy(bits) == 0
    index = torch.from_numpy(rows)
    logits[index] = logits[index].masked_fill(masked.to(logits.device), float("-inf"))


def cpu(logits: torch.Tensor, rows: np.ndarray, bitmask: np.ndarray) -> None:
    """The native `reference`, on any number of threads. logits may have any row stride."""
    require("logits", logits, torch.float32, logits.shape, dense=1)
    num_words = bitmask.shape[1]
    if rows.dtype != np.int64 or bitmask.dtype != np.uint32 or not bitmask.flags.c_contiguous:
        raise ValueError(f"rows are {rows.dtype} and bits {bitmask.dtype}; they must be dense int64 and uint32")
    if bitmask.shape[0] != len(rows) or 32 * num_words < logits.shape[1]:
        raise ValueError(f"bits {bitmask.shape} do not fit {len(rows)} rows of {logits.shape[1]} logits")
    if len(rows) and not (0 <= rows.min() and rows.max() < logits.shape[0]):
        raise ValueError(f"rows {rows.min()} … {rows.max()} are not all among {logits.shape[0]}")
    native.lib.apply_bitmask(
        logits.data_ptr(), logits.shape, logits.stride(0), rows.ctypes.data, bitmask.ctypes.data, bitmask.shape
    )


def cpu_why_not(spec: OpSpec) -> str | None:
    if spec.dtype != torch.float32:
        return f"logits are {spec.dtype}, not torch.float32"
    return native.why_not(spec)


IMPLEMENTATIONS = [
    Impl(cpu, cpu_why_not),
    Impl("triton.bitmask:apply_bitmask", gpu.float32_why_not),
    Impl(reference),
]
apply_bitmask = Op("apply_bitmask", IMPLEMENTATIONS)
