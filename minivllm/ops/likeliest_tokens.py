"""The tokens of the largest logits, in an order that is defined among equals too."""

from __future__ import annotations

import torch

from minivllm.ops import gpu
from minivllm.ops.op import Impl, Op, OpSpec

KEYS_AT_ONCE = 16  # rows: a key has 8 bytes, and there is one of each logit


def reference(logits: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Those of the largest logits of each row, descending; the lowest token id first among equals.

    logits: [num_rows, vocab_size] float32 without NaN, -inf allowed. Returns [num_rows, num_tokens] int64. By keys of
    which no two are equal, so that it does not matter which of equals a `topk` takes.
    """
    if not len(logits):
        return torch.empty(0, num_tokens, dtype=torch.int64, device=logits.device)
    return torch.cat(
        [_keys(rows).topk(num_tokens, dim=1).indices for rows in logits.split(KEYS_AT_ONCE)]
    )


def _keys(logits: torch.Tensor) -> torch.Tensor:
    """int64: a float's order in the upper half, what is left to the vocabulary's end in the lower."""
    bits = (logits + 0.0).view(torch.int32)  # -0.0 is 0.0's equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    vocab_size = logits.shape[1]
    return (ordered << 32) | torch.arange(vocab_size - 1, -1, -1, device=logits.device)


def cpu(logits: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`reference`, by the logits themselves unless some are equal, which is rare: a sixth of the time."""
    vocab_size = logits.shape[1]
    top = logits.topk(min(num_tokens + 1, vocab_size), dim=1)
    found = top.indices[:, :num_tokens]
    has_equals = (top.values[:, 1:] == top.values[:, :-1]).any(1)
    if has_equals.any():
        found[has_equals] = reference(logits[has_equals], num_tokens)
    return found


def cpu_why_not(spec: OpSpec) -> str | None:
    """It looks at what it found, for which a device would be waited for."""
    return None if torch.device(spec.device).type == "cpu" else f"waits for {spec.device}"


IMPLEMENTATIONS = [
    Impl("triton.likeliest_tokens:likeliest_tokens", gpu.float32_why_not),
    Impl(cpu, cpu_why_not),
    Impl(reference),
]
likeliest_tokens = Op("likeliest_tokens", IMPLEMENTATIONS)
