"""What the sampler works on, and the shape of each of its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

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

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ops/bitmask.py` takes them, on the host."""
        bits = np.require(self.bitmask.view(np.int32), requirements=["C", "W"])  # torch takes nothing read-only
        return torch.from_numpy(self.columns), torch.from_numpy(bits)


class Edit(NamedTuple):
    """Numbers added to some of a request's logits; -inf forbids a token."""

    token_ids: np.ndarray  # [k] int64, distinct
    values: np.ndarray  # [k] float32
    behind: int = -1  # only where this is the request's last token; -1: in any case


class Forced(NamedTuple):
    """The one token that may come next, -1 for any: behind these last tokens, and behind any other."""

    behind: dict[int, int]
    otherwise: int


class Penalised(NamedTuple):
    """Divisor or factor of logits of tokens seen; subtracted for each time, and once, in the output."""

    repetition: float
    frequency: float
    presence: float


@dataclass
class LogitsChanges:
    """What a batch's requests ask for before the temperature, by column: for a device that does it by itself.

    Nothing here needs the requests' last tokens, which the host may not know yet. In this order: only the tokens of
    `allowed` are left, edits are added, what is forced is all that is left, and penalties are taken off.
    """

    allowed: dict[int, np.ndarray] = field(default_factory=dict)  # [W] uint32: bits as in GrammarMask
    edits: list[tuple[int, Edit]] = field(default_factory=list)
    forced: dict[int, Forced] = field(default_factory=dict)
    penalties: dict[int, Penalised] = field(default_factory=dict)

    @property
    def columns(self) -> set[int]:
        """Those with any change."""
        return self.constrained.union(self.forced, self.penalties)

    @property
    def constrained(self) -> set[int]:
        """Those that may be left without a token."""
        return {*self.allowed, *(column for column, _ in self.edits)}

    def allow_only(self, column: int, words: np.ndarray) -> None:
        """words: as in `allowed`, of any length that the vocabulary fits into."""
        known = self.allowed.get(column)
        if known is not None:
            num_words = min(len(known), len(words))
            words = known[:num_words] & words[:num_words]
        self.allowed[column] = words


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

    def describe(self, batch: SampleBatch, changes: LogitsChanges) -> None:
        """Say the same in numbers. It may read all of a request's tokens but the last one."""
        for i, user in self._present(batch):
            self.describe_one(user, i, batch, changes)

    def _present(self, batch: SampleBatch) -> Iterator[tuple[int, T]]:
        if self._users:
            for i, row in enumerate(batch.rows.tolist()):
                if row in self._users:
                    yield i, self._users[row]

    def _inside(self, ids: list[int]) -> np.ndarray:
        """Distinct ids inside the vocabulary, in order; int64."""
        return np.array([i for i in dict.fromkeys(ids) if 0 <= i < self.vocab_size], np.int64)

    @abstractmethod
    def user(self, params: SamplingParams, eos_token_ids: list[int]) -> T | None:
        """What to remember of a request that asks for this step; None for the others."""

    @abstractmethod
    def apply_one(self, logits: torch.Tensor, user: T, i: int, batch: SampleBatch) -> None:
        """Change one request's row ([vocab_size]); `i` is its column in the batch."""

    @abstractmethod
    def describe_one(self, user: T, i: int, batch: SampleBatch, changes: LogitsChanges) -> None:
        """Enter one request's part of `describe` under its column."""


class EditsLogits(LogitsStep[T]):
    """A step that adds to some logits."""

    @abstractmethod
    def edits(self, user: T, i: int, batch: SampleBatch) -> Iterator[Edit]:
        """What to add. It may read all of the request's tokens but the last one."""

    def apply_one(self, logits: torch.Tensor, user: T, i: int, batch: SampleBatch) -> None:
        for edit in self.edits(user, i, batch):
            if edit.behind < 0 or batch.token_ids[batch.rows[i], batch.num_tokens[i] - 1] == edit.behind:
                logits[torch.from_numpy(edit.token_ids)] += torch.from_numpy(edit.values)

    def describe_one(self, user: T, i: int, batch: SampleBatch, changes: LogitsChanges) -> None:
        changes.edits += [(i, edit) for edit in self.edits(user, i, batch)]
