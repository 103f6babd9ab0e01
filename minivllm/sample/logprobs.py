"""Logprobs of chosen tokens with the most likely beside them, as lists that can be sent."""

from __future__ import annotations

import torch

from minivllm.messages.engine import LogprobsLists


def gather_logprobs(values: torch.Tensor, token_ids: torch.Tensor, num_logprobs: int) -> LogprobsLists:
    """One row a position: the token itself first, then the `num_logprobs` most likely.

    values: [M, vocab_size] float32, logprobs or logits; token_ids: [M] int64; num_logprobs: -1 for the
    whole vocabulary. A token's rank counts the values at least as large as its own.
    """
    vocab_size = values.shape[1]
    own = values.gather(1, token_ids.unsqueeze(1))
    ranks = (values >= own).sum(1)
    top = values.topk(vocab_size if num_logprobs < 0 else min(num_logprobs, vocab_size), dim=1)
    return LogprobsLists(
        token_ids=torch.cat([token_ids.unsqueeze(1), top.indices], 1).tolist(),
        logprobs=torch.cat([own, top.values], 1).tolist(),
        ranks=ranks.tolist(),
    )


def logprobs_of_tokens(values: torch.Tensor, token_ids: torch.Tensor, asked: list[int]) -> LogprobsLists:
    """As `gather_logprobs`, with the tokens that were asked for in place of the most likely.

    values: [M, vocab_size] float32; token_ids: [M] int64.
    """
    own = values.gather(1, token_ids.unsqueeze(1))
    others = values[:, torch.tensor(asked, dtype=torch.int64)]
    return LogprobsLists(
        token_ids=[[token, *asked] for token in token_ids.tolist()],
        logprobs=torch.cat([own, others], 1).tolist(),
        ranks=(values >= own).sum(1).tolist(),
    )


def append_tokens(lists: LogprobsLists, values: torch.Tensor, asked: torch.Tensor) -> None:
    """Add to each row the tokens asked for at its position.

    values: [M, vocab_size] float32; asked: [M, k] int64, where -1 stands for no token and gets -inf.
    """
    found = values.gather(1, asked.clamp_min(0)).masked_fill(asked < 0, float("-inf"))
    for row, ids in zip(lists.token_ids, asked.tolist()):
        row += ids
    for row, more in zip(lists.logprobs, found.tolist()):
        row += more


def concatenate(parts: list[LogprobsLists]) -> LogprobsLists:
    """The rows of all parts, in order."""
    return LogprobsLists(
        token_ids=[row for part in parts for row in part.token_ids],
        logprobs=[row for part in parts for row in part.logprobs],
        ranks=[rank for part in parts for rank in part.ranks],
    )
