"""What `generate` gives back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import overload


@dataclass
class Logprob:
    """One token's logprob, its rank in the vocabulary (1 = most likely), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs(Sequence[dict[int, Logprob]]):
    """Logprobs of many positions in a few long columns (`flat_logprobs`): a long answer with many of them is then no
    heap of small objects.

    Position i has the entries start_indices[i] … end_indices[i] of the other columns, the token itself first; none
    at position 0 of a prompt. Read by index or loop it gives what the list would: token id -> Logprob.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, row: dict[int, Logprob] | None) -> None:
        """Add a position at the end."""
        self.start_indices.append(len(self.token_ids))
        for token_id, one in (row or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(one.logprob)
            self.ranks.append(one.rank)
            self.decoded_tokens.append(one.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def extend(self, rows: Iterable[dict[int, Logprob] | None]) -> None:
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...

    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...

    def __getitem__(self, index: int | slice) -> dict[int, Logprob] | FlatLogprobs:
        if isinstance(index, slice):
            some = FlatLogprobs()
            some.extend(self[i] for i in range(*index.indices(len(self))))
            return some
        entries = range(self.start_indices[index], self.end_indices[index])
        return {
            self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i]) for i in entries
        }

    def __add__(self, others: Iterable[dict[int, Logprob]]) -> FlatLogprobs:
        both = self[:]
        both.extend(others)
        return both


# For each position: token id -> Logprob. The sampled (or prompt) token comes first.
SampleLogprobs = list[dict[int, Logprob]] | FlatLogprobs
PromptLogprobs = list[dict[int, Logprob] | None] | FlatLogprobs  # None at position 0, which nothing predicts


@dataclass
class CompletionOutput:
    """One of a request's n answers. Under DELTA, text, token_ids and logprobs hold only what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None  # stop · length · abort · error
    stop_reason: int | str | None = None  # the stop string or stop token that ended it; None for end-of-sequence

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """When things happened, in seconds of the front end's monotonic clock."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    """A request's answers so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None  # None of a prompt given as embeddings
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: PromptLogprobs | None = None
    # Of prompt_logprob_token_ids: row i is of prompt position prompt_logprob_start + 1 + i; -inf where the id was -1.
    prompt_token_id_logprobs: list[list[float]] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    error: str | None = field(default=None)  # set when finish_reason is "error"
    num_prompt_tokens: int = -1  # or embeddings; not given: the number of prompt_token_ids

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 0:
            self.num_prompt_tokens = len(self.prompt_token_ids or ())

    def add(self, newer: RequestOutput) -> None:
        """Merge a newer DELTA output into this one, for a consumer slower than the engine."""
        self.finished = newer.finished
        self.error = newer.error
        self.metrics = newer.metrics
        if newer.prompt_logprobs is not None:
            self.prompt_logprobs = newer.prompt_logprobs
        if newer.prompt_token_id_logprobs is not None:
            self.prompt_token_id_logprobs = newer.prompt_token_id_logprobs
        by_index = {output.index: output for output in self.outputs}
        for new in newer.outputs:
            old = by_index.get(new.index)
            if old is None:
                self.outputs.append(new)
                continue
            old.text += new.text
            old.token_ids = old.token_ids + new.token_ids
            if new.logprobs:
                old.logprobs = old.logprobs + new.logprobs if old.logprobs else new.logprobs
            old.cumulative_logprob = new.cumulative_logprob
            old.finish_reason, old.stop_reason = new.finish_reason, new.stop_reason


@dataclass
class BeamSearchSequence:
    """One answer of a beam search: `tokens` and `text` begin with the prompt; an end token is the last of them."""

    tokens: list[int]
    logprobs: SampleLogprobs
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class BeamSearchOutput:
    """A prompt's answers, best first."""

    sequences: list[BeamSearchSequence]
