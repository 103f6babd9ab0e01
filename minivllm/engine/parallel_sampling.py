"""n answers to one prompt: a parent in the front end, n ordinary requests in the core.

Owns the children's ids and seeds, and when their answers make one output.
"""

from __future__ import annotations

import msgspec

from minivllm.messages.engine import EngineCoreRequest
from minivllm.outputs import CompletionOutput
from minivllm.sampling_params import RequestOutputKind

_MASK = (1 << 64) - 1


def child_seed(seed: int, index: int) -> int:
    """The seed of child `index`: output number `index` of SplitMix64 started at `seed` (Steele et al. 2014).

    seed and result: 0 … 2**64 - 1. Distinct for distinct indices of one seed, since SplitMix64 is a bijection.
    """
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class ParentRequest:
    """A request with n > 1 and what its children have answered so far."""

    def __init__(self, request: EngineCoreRequest) -> None:
        self.request = request
        self.n = request.sampling_params.n
        self.output_kind = request.sampling_params.output_kind
        self.child_ids = [f"{i}_{request.request_id}" for i in range(self.n)]
        self._unfinished = set(range(self.n))
        self._answers: dict[int, CompletionOutput] = {}
        self._error: str | None = None

    def child_requests(self) -> list[EngineCoreRequest]:
        """The n requests, each with n = 1, its own id and its own seed."""
        params = self.request.sampling_params.clone(n=1)
        return [
            msgspec.structs.replace(
                self.request,
                request_id=child_id,
                sampling_params=params,
                seed=child_seed(self.request.seed, i),
            )
            for i, child_id in enumerate(self.child_ids)
        ]

    @property
    def finished(self) -> bool:
        return not self._unfinished

    def first_error(self, error: str | None) -> str | None:
        """The first error among the children, `error` of the one that speaks now included."""
        self._error = self._error or error
        return self._error

    def add(self, answer: CompletionOutput) -> list[CompletionOutput]:
        """Take one child's news; the answers to show now, by index.

        DELTA: this news alone. CUMULATIVE: every child's latest. FINAL_ONLY: all of them, once the last has finished.
        """
        if answer.finished:
            self._unfinished.discard(answer.index)
        if self.output_kind is RequestOutputKind.DELTA:
            return [answer]
        self._answers[answer.index] = answer
        if self.output_kind is RequestOutputKind.FINAL_ONLY and self._unfinished:
            return []
        return [self._answers[i] for i in sorted(self._answers)]
