"""Numbers that travel with each step's outputs."""

from __future__ import annotations

import msgspec


class PrefixCacheStats(msgspec.Struct, array_like=True, omit_defaults=True):
    """Since the last report, in tokens."""

    queries: int = 0
    hits: int = 0


class SchedulerStats(msgspec.Struct, array_like=True, omit_defaults=True):
    """The scheduler after a step. Counters count since the last report."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache: PrefixCacheStats = msgspec.field(default_factory=PrefixCacheStats)
    num_preemptions: int = 0
    num_scheduled_tokens: int = 0
    sleep_level: int = 0  # 0: awake


# What a KV block is at a moment, as one byte of `EngineSnapshot.blocks`.
BLOCK_EMPTY = 0  # free, and without content that could be found
BLOCK_CACHED = 1  # free, and found again until it is reused
BLOCK_HELD = 2  # in use by one request
BLOCK_SHARED = 3  # in use by several


class EngineSnapshot(msgspec.Struct):
    """An engine core at a moment, for who asks for it: no text, no ids. Counters count since its start."""

    num_running_reqs: int
    num_waiting_reqs: int
    kv_cache_usage: float
    num_prompt_tokens: int  # of admitted requests
    num_cached_tokens: int  # of these, found in the prefix cache
    num_generation_tokens: int
    num_blocks: int
    block_stride: int  # of a large pool, `blocks` has every so many-th
    blocks: bytes  # one of the four above each, in the order of block ids


class FinishedRequestStats(msgspec.Struct):
    """One ended request, in seconds and tokens. Stays in the front end."""

    finish_reason: str
    num_prompt_tokens: int
    num_generation_tokens: int
    num_cached_tokens: int
    max_tokens_param: int | None
    n_param: int
    e2e_latency_s: float
    queue_s: float
    prefill_s: float
    decode_s: float
    num_preemptions: int = 0

    @property
    def inference_s(self) -> float:
        return self.prefill_s + self.decode_s


class IterationStats(msgspec.Struct):
    """What one message from the core meant to the front end. Stays in the front end."""

    num_prompt_tokens: int = 0  # of requests whose first token came
    num_cached_tokens: int = 0  # of these, found in the prefix cache
    num_generation_tokens: int = 0
    time_to_first_tokens_s: list[float] = []
    inter_token_latencies_s: list[float] = []
    finished_requests: list[FinishedRequestStats] = []
    rejected_by: list[str] = []  # the limit each request ran into that was answered with 503
