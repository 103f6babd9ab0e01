"""Log-probabilities over the vocabulary, of which `token_logprobs.py` is made. Rows are independent.

The native sums go in fixed chunks of the vocabulary merged in ascending order, so that a row's bits
do not depend on the other rows or on the number of threads.
"""

from __future__ import annotations

import torch

from minivllm.ops import native
from minivllm.ops.checks import require
from minivllm.ops.op import OpSpec


def reference(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax of each row. logits: [num_rows, vocab_size] float32, -inf allowed; returns the same shape."""
    return torch.log_softmax(logits, dim=-1)


def cpu(logits: torch.Tensor) -> torch.Tensor:
    """The native `reference`. logits may have any row stride."""
    require("logits", logits, torch.float32, logits.shape, dense=1)
    out = torch.empty(logits.shape)
    native.lib.log_softmax(out.data_ptr(), logits.data_ptr(), logits.shape, logits.stride(0))
    return out


def cpu_why_not(spec: OpSpec) -> str | None:
    if spec.dtype != torch.float32:
        return f"logits are {spec.dtype}, not torch.float32"
    return native.why_not(spec)
