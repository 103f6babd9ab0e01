"""What `generate` gives back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Logprob:
    """One token's logprob, its rank in the vocabulary (1 = most likely), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# For each position: token id -> Logprob. The sampled (or prompt) token comes first.
SampleLogprobs = list[dict[int, Logprob]]
PromptLogprobs = list[dict[int, Logprob] | None]  # None at position 0, which nothing predicts


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
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: PromptLogprobs | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    error: str | None = field(default=None)  # set when finish_reason is "error"

    def add(self, newer: RequestOutput) -> None:
        """Merge a newer DELTA output into this one, for a consumer slower than the engine."""
        self.finished = newer.finished
        self.error = newer.error
        self.metrics = newer.metrics
        if newer.prompt_logprobs is not None:
            self.prompt_logprobs = newer.prompt_logprobs
        by_index = {output.index: output for output in self.outputs}
        for new in newer.outputs:
            old = by_index.get(new.index)
            if old is None:
                self.outputs.append(new)
                continue
            old.text += new.text
            old.token_ids = old.token_ids + new.token_ids
            if new.logprobs:
                old.logprobs = (old.logprobs or []) + new.logprobs
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
