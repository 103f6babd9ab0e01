"""Penalties over counts that stay on the device, for steps whose tokens the host has not seen yet.

Repetition: Keskar et al. 2019, arXiv:1909.05858; frequency and presence are OpenAI's. On a CPU the sampler keeps
counts of its own (`sample/penalties.py`): a request has few distinct tokens, which are gone through one by one there.
"""

from __future__ import annotations

import torch

from minivllm.ops import gpu
from minivllm.ops.op import Impl, Op

IN_PROMPT = 1 << 30  # the bit of a count that says: in the prompt; below it is the number in the output


def reference(
    logits: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> None:
    """Repetition over prompt and output, the others over output, in place.

    logits: [num_rows, vocab_size] float32; counts: [num table rows, vocab_size] int32; rows: [num_rows] int64, each
    one's row of counts; repetition (1 for off), frequency, presence (0 for off): [num_rows] float32.
    """
    seen = counts[rows]
    repetition, frequency, presence = (each.unsqueeze(1) for each in (repetition, frequency, presence))
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    num_output = (seen & (IN_PROMPT - 1)).float()
    changed = repeated - frequency * num_output - presence * (num_output > 0).float()
    logits.copy_(torch.where(seen != 0, changed, logits))


def count_reference(
    counts: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, is_prompt: torch.Tensor
) -> None:
    """Enter tokens into `counts`. rows, token_ids: [n] int64; is_prompt: [n] uint8."""
    prompt = is_prompt.bool()
    counts[rows[prompt], token_ids[prompt]] |= IN_PROMPT
    counts.index_put_((rows[~prompt], token_ids[~prompt]), torch.ones_like(counts[0, :1]), accumulate=True)


apply_penalties = Op(
    "apply_penalties", [Impl("triton.penalties:apply_penalties", gpu.float32_why_not), Impl(reference)]
)
count_tokens = Op(
    "count_tokens", [Impl("triton.penalties:count_tokens", gpu.float32_why_not), Impl(count_reference)]
)
