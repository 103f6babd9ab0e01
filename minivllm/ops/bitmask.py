"""Masking logits by bits: what a grammar allows, one row of bits for each row that has one."""

from __future__ import annotations

import torch

from minivllm.ops import gpu, native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op


def reference(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Mask to -inf, in place, the tokens of some rows whose bit is 0.

    logits: [num_rows, vocab_size] float32; rows: [K] int64, distinct; bitmask: [K, W] int32 with
    32 * W >= vocab_size: bit t % 32 of word t // 32 is token t's. Other rows stay as they are. All on one device.
    """
    bits = (bitmask.unsqueeze(2) >> torch.arange(32, device=bitmask.device)) & 1
    is_masked = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(is_masked, float("-inf")))


def cpu(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
    """The native `reference`, on any number of threads. logits may have any row stride."""
    require("logits", logits, torch.float32, logits.shape, dense=1)
    check_fit(logits, rows, bitmask)
    if len(rows) and not (0 <= rows.min() and rows.max() < logits.shape[0]):
        raise ValueError(f"rows {rows.min()} … {rows.max()} are not all among {logits.shape[0]}")
    native.lib.apply_bitmask(
        logits.data_ptr(), logits.shape, logits.stride(0), rows.data_ptr(), bitmask.data_ptr(), bitmask.shape
    )


def check_fit(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Refuse other types and shapes than `reference` says."""
    require("rows", rows, torch.int64, rows.shape)
    require("bitmask", bitmask, torch.int32, bitmask.shape)
    if bitmask.shape[0] != len(rows) or 32 * bitmask.shape[1] < logits.shape[1]:
        raise ValueError(f"bits {list(bitmask.shape)} do not fit {len(rows)} rows of {logits.shape[1]} logits")


IMPLEMENTATIONS = [
    Impl(cpu, native.float32_why_not),
    Impl("triton.bitmask:apply_bitmask", gpu.float32_why_not),
    Impl(reference),
]
apply_bitmask = Op("apply_bitmask", IMPLEMENTATIONS)
