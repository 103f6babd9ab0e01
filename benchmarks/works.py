"""The loads that engines are compared on: how many requests of what lengths, and their prompts.

Imported by whatever Python an engine has, so it needs the standard library alone. Prompts are random token ids, new
ones for every run, so that no prefix cache helps but with what a load shares within itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Work:
    """`requests` requests, `streams` of them at a time: `num_shared` + `num_in` tokens in, `num_out` out."""

    requests: int
    streams: int
    num_in: int = 128
    num_out: int = 128
    num_shared: int = 0
    least_in: int | None = None  # prompts have from so many tokens to num_in, any number of them

    @property
    def num_tokens(self) -> int:
        """Of one request, in and out, at most."""
        return self.num_shared + self.num_in + self.num_out

    def part(self, requests: int) -> Work:
        """The same with fewer requests: for an engine that would take minutes for all."""
        return replace(self, requests=requests, streams=min(requests, self.streams))

    def prompts(self, vocab_size: int, pick: random.Random) -> list[list[int]]:
        def some(count: int) -> list[int]:
            return [pick.randrange(300, vocab_size - 300) for _ in range(count)]

        shared = some(self.num_shared)
        if self.least_in is None:
            return [shared + some(self.num_in) for _ in range(self.requests)]
        return [shared + some(pick.randint(self.least_in, self.num_in)) for _ in range(self.requests)]


WORKS = {
    "W1": Work(3, 1),
    "W2": Work(64, 64, 256, 128),
    "W3": Work(1, 1, 4096, 16),
    "W4": Work(32, 32, 64, 64, 1024),
    "W5": Work(64, 16),
    "T1": Work(8, 1),
    "T64": Work(256, 64),
}
MIXED = Work(256, 32, 480, 32, least_in=1)  # steps with prompts, hardly two of one size
