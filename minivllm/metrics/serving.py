"""What routes count beside the engine: calls of tools that a parser looked for, and operations of sleep mode."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OPERATION_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds


class ToolCallMetrics:
    """One count for each answer that a parser of tool calls has read to its end."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        self._invocations = Counter(
            "vllm:tool_call_parser_invocations", "Answers read for calls of tools, by what was found.",
            ("model_name", "mode", "outcome", "request_type"), registry=registry,
        )  # fmt: skip

    def count(self, request_type: str, *, is_stream: bool, num_complete: int, num_cut: int) -> None:
        """request_type: the API, chat, responses or messages. num_complete, num_cut: calls in the answer."""
        outcome = "incomplete" if num_cut else "tool_calls" if num_complete else "no_tool_calls"
        mode = "streaming" if is_stream else "non_streaming"
        self._invocations.labels(self._model_name, mode, outcome, request_type).inc()


class SleepMetrics:
    """How long falling asleep and waking up take."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._durations = Histogram(
            "vllm:sleep_mode_operation_duration_seconds", "Time to fall asleep, or to wake up.", ("operation",),
            buckets=OPERATION_BUCKETS, registry=registry,
        )  # fmt: skip
        self._in_flight = Gauge(
            "vllm:sleep_mode_operations_in_flight", "Operations of sleep mode underway.", ("operation",),
            registry=registry, multiprocess_mode="livesum",
        )  # fmt: skip
        for operation in ("sleep", "wake_up"):
            self._in_flight.labels(operation).set(0)
            self._durations.labels(operation)

    @contextlib.contextmanager
    def operation(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with self._in_flight.labels(name).track_inprogress():
            yield
        self._durations.labels(name).observe(time.perf_counter() - began)
