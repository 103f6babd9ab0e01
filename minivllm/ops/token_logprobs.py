"""Logprobs and ranks of given tokens, without a tensor of the vocabulary's size for them.

The native sums go in fixed chunks of the vocabulary merged in ascending order, so that a row's bits do not depend on
the other rows or on the number of threads.
"""

from __future__ import annotations

import torch

from minivllm.ops import gpu, native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op


def reference(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax of each row at some tokens, and how many logits are at least as large as the first one's.

    logits: [num_rows, vocab_size] float32, -inf allowed; token_ids: [num_rows, k] int64, the first of each row inside
    the vocabulary, -1 for none. Returns [num_rows, k] float32, -inf for none, and [num_rows] int64.
    """
    values = torch.log_softmax(logits, -1).gather(1, token_ids.clamp_min(0))
    ranks = (logits >= logits.gather(1, token_ids[:, :1])).sum(1)
    return values.masked_fill_(token_ids < 0, float("-inf")), ranks


def cpu(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The native `reference`: logits, of any row stride, are read once.

    Raises:
        IndexError: a token lies outside the vocabulary.
    """
    require("logits", logits, torch.float32, logits.shape, dense=1)
    require("token_ids", token_ids, torch.int64, (len(logits), token_ids.shape[1]))
    values, ranks = torch.empty(token_ids.shape), torch.empty(len(logits), dtype=torch.int64)
    native.lib.token_logprobs(
        values.data_ptr(), ranks.data_ptr(), logits.data_ptr(), logits.shape, logits.stride(0),
        token_ids.data_ptr(), token_ids.shape[1],
    )  # fmt: skip
    return values, ranks


IMPLEMENTATIONS = [
    Impl(cpu, native.float32_why_not),
    Impl("triton.token_logprobs:token_logprobs", gpu.float32_why_not),
    Impl(reference),
]
token_logprobs = Op("token_logprobs", IMPLEMENTATIONS)
