"""What the sampler works on, and the shape of each of its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from minivllm.sampling_params import SamplingParams

T = TypeVar("T")


@dataclass(frozen=True)
class SampleBatch:
    """The requests that get a token in this step; column i belongs to row i of the logits."""

    rows: np.ndarray  # [M] int64: each one's row in the worker's tables, the same as long as it is known
    num_tokens: np.ndarray  # [M] int64: tokens known, so the absolute position of the one to come
    num_prompt_tokens: np.ndarray  # [M] int64
    token_ids: np.ndarray  # [num table rows, max_model_len] int32: all known tokens, by table row
    # [M] bool: whose prompt is vectors, so that its token ids mean nothing; None: nobody's.
    has_vectors: np.ndarray | None = None

    @property
    def num_output_tokens(self) -> np.ndarray:
        return self.num_tokens - self.num_prompt_tokens

    def first_token(self, i: int) -> int:
        """The position of column i's first token that is one."""
        return int(self.num_prompt_tokens[i]) if self.has_vectors is not None and self.has_vectors[i] else 0


@dataclass(frozen=True)
class GrammarMask:
    """What grammars allow in some columns of a batch."""

    columns: np.ndarray  # [K] int64
    bitmask: np.ndarray  # [K, at least vocab_size / 32] uint32: bit t % 32 of word t // 32 allows token t


class LogitsStep(ABC, Generic[T]):
    """One change to the logits that some requests ask for. Costs nothing where nobody does.

    Every row is changed by its own request alone, by arithmetic that does not depend on the others.
    """

    field = ""  # of SamplingParams that asks for it

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._users: dict[int, T] = {}  # by table row

    def add_request(self, row: int, params: SamplingParams, eos_token_ids: list[int]) -> None:
        user = self.user(params, eos_token_ids)
        if user is not None:
            self._users[row] = user

    def remove_request(self, row: int) -> None:
        self._users.pop(row, None)

    @property
    def is_idle(self) -> bool:
        """Whether no known request asks for this."""
        return not self._users

    @property
    def rows(self) -> Collection[int]:
        """Of the worker's tables, those of the requests that ask for this."""
        return self._users.keys()

    def apply(self, logits: torch.Tensor, batch: SampleBatch) -> bool:
        """Change the logits ([M, vocab_size] float32) in place; whether anything was done."""
        changed = False
        for i, user in self._present(batch):
            self.apply_one(logits[i], user, i, batch)
            changed = True
        return changed

    def forbids_tokens(self, i: int, batch: SampleBatch) -> bool:
        """Whether column i of a batch may not choose some tokens because of this step."""
        user = self._users.get(int(batch.rows[i]))
        return user is not None and self.forbids(user, i, batch)

    def forbids(self, user: T, i: int, batch: SampleBatch) -> bool:
        """`forbids_tokens`, of a request that asks for this step. Those that forbid say so."""
        return False

    def _present(self, batch: SampleBatch) -> Iterator[tuple[int, T]]:
        if self._users:
            for i, row in enumerate(batch.rows.tolist()):
                if row in self._users:
                    yield i, self._users[row]

    def _token_tensor(self, ids: list[int]) -> torch.Tensor:
        """Distinct ids inside the vocabulary, in order."""
        return torch.tensor([i for i in dict.fromkeys(ids) if 0 <= i < self.vocab_size], dtype=torch.int64)

    @abstractmethod
    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> T | None:
        """What to remember of a request that asks for this step; None for the others."""

    @abstractmethod
    def apply_one(self, logits: torch.Tensor, user: T, i: int, batch: SampleBatch) -> None:
        """Change one request's row ([vocab_size]); `i` is its column in the batch."""
