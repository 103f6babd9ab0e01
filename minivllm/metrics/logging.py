"""The line that says every ten seconds how the engine does. Silent when there was nothing to do."""

from __future__ import annotations

from collections import deque

from minivllm.logger import init_logger
from minivllm.messages.stats import IterationStats, SchedulerStats

logger = init_logger(__name__)

INTERVAL_S = 10.0
NUM_RECENT_QUERIES = 1000  # of the prefix cache, for its hit rate


class LoggingStatLogger:
    """Sums between two calls of `log`; the caller owns the clock."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._scheduler = SchedulerStats()
        self._hears_scheduler = False  # of several API servers only one does
        self._recent: deque[tuple[int, int]] = deque(maxlen=NUM_RECENT_QUERIES)
        self._was_busy = False

    def record(self, scheduler_stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """Add one message of the engine core."""
        self._num_prompt_tokens += iteration.num_prompt_tokens
        self._num_generation_tokens += iteration.num_generation_tokens
        if scheduler_stats is not None:
            self._scheduler = scheduler_stats
            self._hears_scheduler = True
            prefix = scheduler_stats.prefix_cache
            if prefix.queries:
                self._recent.append((prefix.queries, prefix.hits))

    def log(self, now: float) -> None:
        """Write the line for the time since the last call, unless nothing happened then nor before it."""
        line = self._line(now)
        busy = bool(
            self._num_prompt_tokens
            or self._num_generation_tokens
            or self._scheduler.num_running_reqs
            or self._scheduler.num_waiting_reqs
        )
        self._since, self._num_prompt_tokens, self._num_generation_tokens = now, 0, 0
        if busy or self._was_busy:  # one line of zeros shows that it has come to rest
            logger.info(line)
        self._was_busy = busy

    def _line(self, now: float) -> str:
        elapsed_s = max(now - self._since, 1e-9)
        queries = sum(q for q, _ in self._recent)
        hits = sum(h for _, h in self._recent)
        rates = (
            f"Engine 000: "
            f"Avg prompt throughput: {self._num_prompt_tokens / elapsed_s:.1f} tokens/s, "
            f"Avg generation throughput: {self._num_generation_tokens / elapsed_s:.1f} tokens/s"
        )
        if not self._hears_scheduler:
            return f"{rates} (through this API server)"
        return (
            f"{rates}, "
            f"Running: {self._scheduler.num_running_reqs} reqs, "
            f"Waiting: {self._scheduler.num_waiting_reqs} reqs, "
            f"GPU KV cache usage: {100 * self._scheduler.kv_cache_usage:.1f}%, "
            f"Prefix cache hit rate: {100 * hits / queries if queries else 0:.1f}%"
        )
