"""Logprobs and ranks of given tokens, without a tensor of the vocabulary's size for them.

Nothing calls it yet: logprobs are the host's, also for a GPU (docs/gpu.md).
"""

from __future__ import annotations

import torch

from minivllm.ops import gpu
from minivllm.ops.op import Impl, Op


def reference(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax of each row at some tokens, and how many logits are at least as large as the first one's.

    logits: [num_rows, vocab_size] float32, -inf allowed; token_ids: [num_rows, k] int64, the first of each row inside
    the vocabulary, -1 for none. Returns [num_rows, k] float32, -inf for none, and [num_rows] int64.
    """
    values = torch.log_softmax(logits, -1).gather(1, token_ids.clamp_min(0))
    own = logits.gather(1, token_ids[:, :1])
    return values.masked_fill(token_ids < 0, float("-inf")), (logits >= own).sum(1)


IMPLEMENTATIONS = [Impl("triton.log_softmax:token_logprobs", gpu.float32_why_not), Impl(reference)]
token_logprobs = Op("token_logprobs", IMPLEMENTATIONS)
