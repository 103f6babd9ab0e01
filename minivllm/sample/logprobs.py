"""Logprobs of chosen tokens with others beside them: read where the logits are, sent as lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minivllm.messages.engine import LogprobsLists
from minivllm.ops.likeliest_tokens import likeliest_tokens
from minivllm.ops.op import OpSpec
from minivllm.ops.token_logprobs import token_logprobs


@dataclass(frozen=True)
class TokenValues:
    """A row a position: the token itself first, then the others."""

    token_ids: torch.Tensor  # [M, 1 + k] int64, -1 for none
    values: torch.Tensor  # [M, 1 + k] float32: logprobs or logits, -inf for none
    ranks: torch.Tensor  # [M] int64, of the token itself: how many logits are at least as large as its own

    def to_host(self, fetch: Callable[[torch.Tensor], torch.Tensor]) -> TokenValues:
        """The same where `fetch` brings each."""
        return TokenValues(fetch(self.token_ids), fetch(self.values), fetch(self.ranks))

    def lists(self) -> LogprobsLists:
        """In host memory."""
        return LogprobsLists(self.token_ids.tolist(), self.values.tolist(), self.ranks.tolist())

    def lists_of_rows(self) -> list[LogprobsLists]:
        """The same, row by row."""
        columns = (self.token_ids.tolist(), self.values.tolist(), self.ranks.tolist())
        return [LogprobsLists([ids], [values], [rank]) for ids, values, rank in zip(*columns)]


class LogprobsReader:
    """Rows are independent: what one asks for changes nothing of another, ties included."""

    def __init__(self, spec: OpSpec, *, is_logprobs: bool = True) -> None:
        """spec: of the logits; is_logprobs: or the logits themselves."""
        self._values = token_logprobs.select(spec) if is_logprobs else _token_logits
        self._likeliest = likeliest_tokens.select(spec)

    def __call__(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        num_likeliest: int = 0,
        also: torch.Tensor | None = None,
    ) -> TokenValues:
        """Of each row its token, the `num_likeliest` largest (-1 for the whole vocabulary), and those asked for.

        logits: [M, vocab_size] float32, left as they are; token_ids: [M] int64; also: [M, k] int64, -1 for none.
        """
        vocab_size = logits.shape[1]
        parts = [token_ids.unsqueeze(1)]
        if num_likeliest:
            parts.append(
                self._likeliest(logits, vocab_size if num_likeliest < 0 else min(num_likeliest, vocab_size))
            )
        if also is not None:
            parts.append(also)
        ids = torch.cat(parts, 1)
        return TokenValues(ids, *self._values(logits, ids))


def _token_logits(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_logprobs`, of the logits themselves."""
    found = logits.gather(1, token_ids.clamp_min(0))
    return found.masked_fill(token_ids < 0, float("-inf")), (logits >= found[:, :1]).sum(1)


def concatenate(parts: list[LogprobsLists]) -> LogprobsLists:
    """The rows of all parts, in order."""
    return LogprobsLists(
        token_ids=[row for part in parts for row in part.token_ids],
        logprobs=[row for part in parts for row in part.logprobs],
        ranks=[rank for part in parts for rank in part.ranks],
    )
