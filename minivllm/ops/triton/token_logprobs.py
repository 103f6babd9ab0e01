"""Log-probabilities of given tokens, with no more written than is asked for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.ops.checks import require

_CHUNK = 4096
_FEW_ASKED, _MANY_ASKED = 32, 1024  # tokens at once: one code for all who ask for few, another for all others


@triton.jit
def _log_sum(row, vocab_size, CHUNK: tl.constexpr):
    """Maximum of a row, and log of the sum of exp(x - maximum): chunk after chunk, ascending."""
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, vocab_size, CHUNK):
        index = start + tl.arange(0, CHUNK)
        x = tl.load(row + index, mask=index < vocab_size, other=float("-inf"), eviction_policy="evict_last")
        new_top = tl.maximum(top, tl.max(x, 0))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - safe_top) + tl.sum(tl.exp(x - safe_top), 0)
        top = new_top
    return tl.max(top, 0), tl.sum(tl.log(total), 0)


@triton.jit(do_not_specialize=["num_asked"])
def _token_logprobs_kernel(
    logprobs,
    ranks,
    logits,
    token_ids,
    row_stride,
    vocab_size,
    num_asked,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (num_rows,)."""
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * row_stride
    top, log_total = _log_sum(row, vocab_size, CHUNK)
    for start in range(0, num_asked, BLOCK):
        asked = start + tl.arange(0, BLOCK)
        tokens = tl.load(token_ids + at * num_asked + asked, mask=asked < num_asked, other=-1)
        is_token = (tokens >= 0) & (tokens < vocab_size)
        values = tl.load(row + tokens, mask=is_token, other=float("-inf")) - top - log_total
        tl.store(logprobs + at * num_asked + asked, values, mask=asked < num_asked)
    own = tl.load(row + tl.load(token_ids + at * num_asked))
    rank = tl.zeros([1], tl.int32)
    for start in range(0, vocab_size, CHUNK):
        index = start + tl.arange(0, CHUNK)
        x = tl.load(row + index, mask=index < vocab_size, other=float("-inf"))
        rank += tl.sum(((x >= own) & (index < vocab_size)).to(tl.int32), 0)
    tl.store(ranks + at, tl.sum(rank, 0).to(tl.int64))


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference` of `ops/token_logprobs.py`. logits may have any row stride."""
    num_rows, num_asked = token_ids.shape
    require("logits", logits, torch.float32, (num_rows, logits.shape[1]), dense=1)
    require("token_ids", token_ids, torch.int64, token_ids.shape)
    logprobs = torch.empty(num_rows, num_asked, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        block = _FEW_ASKED if num_asked <= _FEW_ASKED else _MANY_ASKED
        _token_logprobs_kernel[(num_rows,)](
            logprobs, ranks, logits, token_ids, logits.stride(0), logits.shape[1], num_asked,
            CHUNK=_CHUNK, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return logprobs, ranks
