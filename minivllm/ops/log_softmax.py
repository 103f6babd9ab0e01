"""Reductions over the vocabulary: log-probabilities and the greedy token. Rows are independent.

The native sums go in fixed chunks of the vocabulary merged in ascending order, so that a row's bits
do not depend on the other rows or on the number of threads.
"""

from __future__ import annotations

import torch

from minivllm.ops import native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op, OpSpec


def reference(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax of each row. logits: [num_rows, vocab_size] float32, -inf allowed; returns the same shape."""
    return torch.log_softmax(logits, dim=-1)


def cpu(logits: torch.Tensor) -> torch.Tensor:
    """The native `reference`. logits may have any row stride."""
    require("logits", logits, torch.float32, logits.shape, dense=1)
    out = torch.empty(logits.shape)
    native.lib.log_softmax(out.data_ptr(), logits.data_ptr(), logits.shape, logits.stride(0))
    return out


def argmax_reference(logits: torch.Tensor) -> torch.Tensor:
    """The index of each row's largest value, the lowest on ties; the row must hold no NaN.

    logits: [num_rows, vocab_size] float32; returns [num_rows] int64.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    return (logits == largest).to(torch.uint8).argmax(dim=-1)


def argmax_cpu(logits: torch.Tensor) -> torch.Tensor:
    """The native `argmax_reference`. logits may have any row stride."""
    require("logits", logits, torch.float32, logits.shape, dense=1)
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    native.lib.argmax(out.data_ptr(), logits.data_ptr(), logits.shape, logits.stride(0))
    return out


def cpu_why_not(spec: OpSpec) -> str | None:
    if spec.dtype != torch.float32:
        return f"logits are {spec.dtype}, not torch.float32"
    return native.why_not(spec)


IMPLEMENTATIONS = [Impl(cpu, cpu_why_not), Impl(reference)]
ARGMAX_IMPLEMENTATIONS = [Impl(argmax_cpu, cpu_why_not), Impl(argmax_reference)]
log_softmax = Op("log_softmax", IMPLEMENTATIONS)
argmax = Op("argmax", ARGMAX_IMPLEMENTATIONS)
