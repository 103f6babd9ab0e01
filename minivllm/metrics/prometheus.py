"""The engine's numbers under vLLM's metric names, so that its dashboards and alerts work here.

Owns names, labels and buckets. A logger has its own registry: nothing is global.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from minivllm.messages.engine import EngineCoreReady, FinishReason
from minivllm.messages.stats import FinishedRequestStats, IterationStats, SchedulerStats

LABELS = ("model_name", "engine")

# In seconds. fmt: off
REQUEST_LATENCY_BUCKETS = [
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
]
TIME_TO_FIRST_TOKEN_BUCKETS = [
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
]
INTER_TOKEN_LATENCY_BUCKETS = [
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
]
# In tokens, and in answers a request.
ITERATION_TOKENS_BUCKETS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
REQUEST_PARAMS_N_BUCKETS = [1, 2, 5, 10, 20]
REQUEST_NUM_PREEMPTIONS_BUCKETS = [1, 2, 3, 4, 5, 10, 20]
CACHE_SOURCES = ("device", "host", "disk", "p2p", "external_unspecified")
# fmt: on


def request_tokens_buckets(max_model_len: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to the context's length."""
    buckets, scale = [], 1
    while scale <= max_model_len:
        buckets += [digit * scale for digit in (1, 2, 5) if digit * scale <= max_model_len]
        scale *= 10
    return buckets


def make_registry(*, multiprocess: bool = False) -> CollectorRegistry:
    """A registry that knows this process: its memory, CPU time, open files and garbage collections.

    multiprocess: one of several API servers, whose counts are to be summed; then it knows nothing of the process.
    """
    registry = CollectorRegistry()
    if multiprocess:
        return registry
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def summed(registry: CollectorRegistry) -> CollectorRegistry:
    """What to show: the registry, or the sum of all API servers' where they put their counts together."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return registry
    together = CollectorRegistry()
    MultiProcessCollector(together)
    return together


class BulkHistogram(Collector):
    """A histogram for a value a token: prometheus_client's own takes a lock and several calls for each."""

    def __init__(self, name: str, text: str, buckets: list[float], labels: dict[str, str]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)  # not cumulated; the last is above every bucket
        self._sum = 0.0

    def observe_all(self, values: list[float]) -> None:
        """Add values; one equal to a bucket's bound is in it."""
        buckets, counts = self._buckets, self._counts
        for value in values:
            counts[bisect_left(buckets, value)] += 1
        self._sum += sum(values)

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), list(self._cumulated()), self._sum)
        yield family

    def _cumulated(self) -> Iterator[tuple[str, float]]:
        total = 0
        for bound, count in zip([*map(float, self._buckets), "+Inf"], self._counts):
            total += count
            yield str(bound), total


class PrometheusStatLogger:
    """Counts into `registry`; every metric exists, at zero, from the start."""

    def __init__(
        self, registry: CollectorRegistry, model_name: str, ready: EngineCoreReady, *, multiprocess: bool = False
    ) -> None:
        """multiprocess: one of several API servers (see `summed`)."""
        self._registry = registry
        self._multiprocess = multiprocess
        self._labels = {"model_name": model_name, "engine": "0"}
        self._make_gauges(ready)
        self._make_counters()
        self._make_histograms(ready.max_model_len)

    def _make(self, kind: type, name: str, text: str, **options: Any) -> Any:
        if kind is Gauge:  # only one of several API servers hears of the scheduler
            options["multiprocess_mode"] = "mostrecent"
        return kind(f"vllm:{name}", text, LABELS, registry=self._registry, **options).labels(**self._labels)

    def _make_gauges(self, ready: EngineCoreReady) -> None:
        self._num_running = self._make(Gauge, "num_requests_running", "Requests in the running batch.")
        self._num_waiting = self._make(Gauge, "num_requests_waiting", "Requests waiting to be scheduled.")
        by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason", "Requests waiting, by what for.", (*LABELS, "reason"),
            registry=self._registry, multiprocess_mode="mostrecent",
        )  # fmt: skip
        self._num_waiting_for_capacity = by_reason.labels(**self._labels, reason="capacity")
        by_reason.labels(**self._labels, reason="deferred").set(0)  # nothing here waits for anything else
        sleep = Gauge(
            "vllm:engine_sleep_state", "1 for the state the engine is in.", (*LABELS, "sleep_state"),
            registry=self._registry, multiprocess_mode="mostrecent",
        )  # fmt: skip
        # By sleep level. At the first the weights stay where they are; vLLM's name for it is kept.
        states = ("awake", "weights_offloaded", "discard_all")
        self._sleep_states = [sleep.labels(**self._labels, sleep_state=state) for state in states]
        self._set_sleep_level(0)
        self._kv_usage = self._make(
            Gauge, "kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it."
        )
        info = {
            "block_size": ready.block_size,
            "num_gpu_blocks": ready.num_gpu_blocks,
            "kv_cache_memory_bytes": ready.kv_cache_bytes,
            "kv_cache_size_tokens": ready.kv_cache_size_tokens,
            "kv_cache_max_concurrency": ready.kv_cache_max_concurrency,
        }
        labels = {"engine": "0", **{name: str(value) for name, value in info.items()}}
        gauge = Gauge(
            "vllm:cache_config_info", "The KV cache's sizes, as labels.", labels, registry=self._registry,
            multiprocess_mode="mostrecent",
        )  # fmt: skip
        gauge.labels(**labels).set(1)
        # Said once, for a directory of PROMETHEUS_MULTIPROC_DIR may hold what another process said.
        self._last_stats = SchedulerStats()
        for gauge in (self._num_running, self._num_waiting, self._num_waiting_for_capacity, self._kv_usage):
            gauge.set(0)

    def _make_counters(self) -> None:
        make = self._make
        self._prefix_queries = make(
            Counter, "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = make(Counter, "prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = make(Counter, "num_preemptions", "Requests preempted by the scheduler.")
        self._prompt_tokens = make(Counter, "prompt_tokens", "Prompt tokens processed.")
        self._cached_tokens = make(
            Counter, "prompt_tokens_cached", "Prompt tokens taken from the prefix cache."
        )
        self._generation_tokens = make(Counter, "generation_tokens", "Tokens generated.")
        sources = Counter(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their KV came from.", (*LABELS, "source"),
            registry=self._registry,
        )  # fmt: skip
        self._computed_here = sources.labels(**self._labels, source="local_compute")
        self._found_here = sources.labels(**self._labels, source="local_cache_hit")
        cached_by = Counter(
            "vllm:prompt_tokens_cached_by_source", "Prompt tokens found cached, by where.", (*LABELS, "source"),
            registry=self._registry,
        )  # fmt: skip
        by_source = {source: cached_by.labels(**self._labels, source=source) for source in CACHE_SOURCES}
        self._cached_on_device = by_source["device"]  # the one there is; the others stay at zero
        rejections = Counter(
            "vllm:admission_rejections", "Requests answered with 503, by limit.", ("model_name", "reason"),
            registry=self._registry,
        )  # fmt: skip
        self._rejections = {
            reason: rejections.labels(model_name=self._labels["model_name"], reason=reason)
            for reason in ("max_num_queued_reqs", "max_num_queued_tokens")
        }
        success = Counter(
            "vllm:request_success",
            "Requests ended, by reason.",
            (*LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._finished = {
            str(reason): success.labels(**self._labels, finished_reason=str(reason))
            for reason in FinishReason
        }

    def _make_histograms(self, max_model_len: int) -> None:
        tokens = request_tokens_buckets(max_model_len)

        def histogram(name: str, text: str, buckets: list[Any]) -> Any:
            return self._make(Histogram, name, text, buckets=buckets)

        self._iteration_tokens = histogram(
            "iteration_tokens_total", "Tokens computed in an engine step.", ITERATION_TOKENS_BUCKETS
        )
        self._ttft = histogram(
            "time_to_first_token_seconds", "Time to first token.", TIME_TO_FIRST_TOKEN_BUCKETS
        )
        text = "Time between two tokens of a request."
        if self._multiprocess:  # only prometheus_client's own counts can be summed
            itl = histogram("inter_token_latency_seconds", text, INTER_TOKEN_LATENCY_BUCKETS)
            self._observe_gaps = lambda values: [itl.observe(value) for value in values]
        else:
            name = "vllm:inter_token_latency_seconds"
            bulk = BulkHistogram(name, text, INTER_TOKEN_LATENCY_BUCKETS, self._labels)
            self._registry.register(bulk)
            self._observe_gaps = bulk.observe_all
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, per request.",
            INTER_TOKEN_LATENCY_BUCKETS,
        )  # fmt: skip
        # Of a finished request: the field of FinishedRequestStats, and the histogram it goes to.
        self._per_request = [
            ("num_prompt_tokens", histogram("request_prompt_tokens", "Prompt tokens.", tokens)),
            ("num_generation_tokens", histogram("request_generation_tokens", "Tokens generated.", tokens)),
            (
                "num_generation_tokens",
                histogram("request_max_num_generation_tokens", "Tokens of the longest of n answers.", tokens),
            ),
            ("max_tokens_param", histogram("request_params_max_tokens", "max_tokens, as run.", tokens)),
            (
                "num_preemptions",
                histogram("request_num_preemptions", "Times preempted.", REQUEST_NUM_PREEMPTIONS_BUCKETS),
            ),
            ("n_param", histogram("request_params_n", "Answers asked for.", REQUEST_PARAMS_N_BUCKETS)),
            (
                "e2e_latency_s",
                histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST_LATENCY_BUCKETS),
            ),
            (
                "queue_s",
                histogram("request_queue_time_seconds", "Arrival to first step.", REQUEST_LATENCY_BUCKETS),
            ),
            (
                "inference_s",
                histogram("request_inference_time_seconds", "First step to end.", REQUEST_LATENCY_BUCKETS),
            ),
            (
                "prefill_s",
                histogram(
                    "request_prefill_time_seconds", "First step to first token.", REQUEST_LATENCY_BUCKETS
                ),
            ),
            (
                "decode_s",
                histogram("request_decode_time_seconds", "First to last token.", REQUEST_LATENCY_BUCKETS),
            ),
        ]
        self._computed_prompt_tokens = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens not found in the prefix cache.", tokens
        )

    def record(self, scheduler_stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """Add one message of the engine core."""
        # Most messages are of a step in which everybody decoded: what such a step does not change is left alone.
        if scheduler_stats is not None:
            self._record_scheduler(scheduler_stats)
        if iteration.num_prompt_tokens:
            self._prompt_tokens.inc(iteration.num_prompt_tokens)
            self._cached_tokens.inc(iteration.num_cached_tokens)
            self._cached_on_device.inc(iteration.num_cached_tokens)
            self._found_here.inc(iteration.num_cached_tokens)
            self._computed_here.inc(iteration.num_prompt_tokens - iteration.num_cached_tokens)
        self._generation_tokens.inc(iteration.num_generation_tokens)
        for seconds in iteration.time_to_first_tokens_s:
            self._ttft.observe(seconds)
        self._observe_gaps(iteration.inter_token_latencies_s)
        for reason in iteration.rejected_by:
            self._rejections[reason].inc()
        for finished in iteration.finished_requests:
            self._record_finished(finished)

    def log(self, now: float) -> None:
        """Nothing to say: it is scraped."""

    def _set_sleep_level(self, level: int) -> None:
        self._sleep_level = level
        for of_level, gauge in enumerate(self._sleep_states):
            gauge.set(of_level == level)

    def _record_scheduler(self, stats: SchedulerStats) -> None:
        if stats.sleep_level != self._sleep_level:
            self._set_sleep_level(stats.sleep_level)
        last, self._last_stats = self._last_stats, stats
        if stats.num_running_reqs != last.num_running_reqs:
            self._num_running.set(stats.num_running_reqs)
        if stats.num_waiting_reqs != last.num_waiting_reqs:
            self._num_waiting.set(stats.num_waiting_reqs)
            self._num_waiting_for_capacity.set(stats.num_waiting_reqs)
        if stats.kv_cache_usage != last.kv_cache_usage:
            self._kv_usage.set(stats.kv_cache_usage)
        if stats.prefix_cache.queries:
            self._prefix_queries.inc(stats.prefix_cache.queries)
            self._prefix_hits.inc(stats.prefix_cache.hits)
        if stats.num_preemptions:
            self._preemptions.inc(stats.num_preemptions)
        if stats.num_scheduled_tokens:
            self._iteration_tokens.observe(stats.num_scheduled_tokens)

    def _record_finished(self, finished: FinishedRequestStats) -> None:
        if (counter := self._finished.get(finished.finish_reason)) is not None:
            counter.inc()
        for name, histogram in self._per_request:
            if (value := getattr(finished, name)) is not None:
                histogram.observe(value)
        self._computed_prompt_tokens.observe(finished.num_prompt_tokens - finished.num_cached_tokens)
        if finished.num_generation_tokens > 1:
            self._tpot.observe(finished.decode_s / (finished.num_generation_tokens - 1))
