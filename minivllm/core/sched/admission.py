"""Who may leave the waiting queue: a list of rules, each of which says why not, or None.

The first reason ends the step's admissions, for nobody overtakes; but a rule may let others pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property

from minivllm.core.kv_cache_manager import CachedPrefix, KVCacheManager
from minivllm.core.request import Request
from minivllm.core.sched.chunks import ChunkSizes
from minivllm.core.sched.step import Step


class Candidate:
    """The request at the head of the queue, and what the prefix cache has of it: looked up once, if asked for."""

    def __init__(self, request: Request, kv_cache: KVCacheManager) -> None:
        self.request = request
        self._kv_cache = kv_cache

    @cached_property
    def cached_prefix(self) -> CachedPrefix:
        return self._kv_cache.find_cached_prefix(self.request)

    @property
    def num_cached_tokens(self) -> int:
        return self.cached_prefix.num_blocks * self._kv_cache.block_size

    @property
    def num_uncomputed_tokens(self) -> int:
        """What it wants computed, at least 1."""
        return self.request.num_tokens - self.num_cached_tokens


class AdmissionRule(ABC):
    """One condition. Cheap rules stand first in the scheduler's list."""

    lets_others_pass = False  # who waits for this takes nothing from those behind, and need not hold them up

    @abstractmethod
    def why_not(self, candidate: Candidate, step: Step) -> str | None:
        """The reason this candidate must wait, or None."""


class FitsBatch(AdmissionRule):
    """At most so many requests run."""

    def __init__(self, running: list[Request], max_num_running: int) -> None:
        self._running = running
        self._max_num_running = max_num_running

    def why_not(self, candidate: Candidate, step: Step) -> str | None:
        if len(self._running) < self._max_num_running:
            return None
        return f"{len(self._running)} requests run; --max-num-seqs or --max-num-active-seqs allows no more"


class FitsTokenBudget(AdmissionRule):
    """Some budget is left; without chunked prefill, enough for the whole prompt."""

    def __init__(self, enable_chunked_prefill: bool) -> None:
        self._enable_chunked_prefill = enable_chunked_prefill

    def why_not(self, candidate: Candidate, step: Step) -> str | None:
        if step.token_budget == 0:
            return "the step's token budget is spent"
        if self._enable_chunked_prefill or candidate.num_uncomputed_tokens <= step.token_budget:
            return None
        return (
            f"{candidate.num_uncomputed_tokens} tokens must be computed at once, {step.token_budget} are left"
        )


class PrefixNotUnderway(AdmissionRule):
    """Nobody computes its next block in this step or one in flight: soon it is found, and computed once for all.

    So of many requests that arrive together with one long prefix (n > 1, a shared system prompt), the first
    computes it and the others start when that is done.
    """

    lets_others_pass = True

    def __init__(self, in_flight: Iterable[Step]) -> None:
        self._in_flight = in_flight

    def why_not(self, candidate: Candidate, step: Step) -> str | None:
        for planned in (step, *self._in_flight):
            if planned.blocks_underway and candidate.cached_prefix.next_hash in planned.blocks_underway:
                return "its prefix is being computed by another request and will be in the cache soon"
        return None


class KVBlocksFree(AdmissionRule):
    """Every token the request has gets its block now: admitting it for a chunk, to evict it later, is waste.

    Without `reserve_full_isl` the first chunk's blocks are enough. `num_kept` blocks stay free for those that run, if
    anybody does.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        chunks: ChunkSizes,
        running: list[Request],
        *,
        reserve_full_isl: bool,
        num_kept: int,
    ) -> None:
        self._kv_cache = kv_cache
        self._chunks = chunks
        self._running = running
        self._reserve_full_isl = reserve_full_isl
        self._num_kept = num_kept

    def num_tokens_to_hold(self, candidate: Candidate, step: Step) -> int:
        """For how many of its tokens the candidate would get blocks."""
        if self._reserve_full_isl:
            return candidate.request.num_tokens
        chunk = self._chunks.of_candidate(candidate.num_uncomputed_tokens, step)
        return candidate.num_cached_tokens + chunk

    def why_not(self, candidate: Candidate, step: Step) -> str | None:
        num_lacking = self._kv_cache.num_blocks_lacking(
            self.num_tokens_to_hold(candidate, step),
            candidate.cached_prefix,
            self._num_kept if self._running else 0,
        )
        return f"{num_lacking} more KV blocks must become free" if num_lacking else None
