"""Logprobs and ranks of given tokens, without a tensor of the vocabulary's size for them."""

from __future__ import annotations

import torch

from minivllm.ops import gpu, log_softmax
from minivllm.ops.op import Impl, Op


def reference(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax of each row at some tokens, and how many logits are at least as large as the first one's.

    logits: [num_rows, vocab_size] float32, -inf allowed; token_ids: [num_rows, k] int64, the first of each row inside
    the vocabulary, -1 for none. Returns [num_rows, k] float32, -inf for none, and [num_rows] int64.
    """
    return _gathered(log_softmax.reference(logits), token_ids), (logits >= logits.gather(1, token_ids[:, :1])).sum(1)


def cpu(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference` with the native log-softmax. logits may have any row stride."""
    own = logits.gather(1, token_ids[:, :1])
    ranks = torch.empty(len(logits), dtype=torch.int64)
    for i in range(len(logits)):  # row by row, what was compared is in the cache when it is counted
        ranks[i] = (logits[i] >= own[i]).sum()
    return _gathered(log_softmax.cpu(logits), token_ids), ranks


def _gathered(values: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return values.gather(1, token_ids.clamp_min(0)).masked_fill_(token_ids < 0, float("-inf"))


IMPLEMENTATIONS = [
    Impl(cpu, log_softmax.cpu_why_not),
    Impl("triton.token_logprobs:token_logprobs", gpu.float32_why_not),
    Impl(reference),
]
token_logprobs = Op("token_logprobs", IMPLEMENTATIONS)
