"""HTTP requests counted under the names of prometheus-fastapi-instrumentator, which vLLM's dashboards use.

Labels hold the route's template, never what a client wrote. Probes and scrapers are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary

NOT_COUNTED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", "/server_info"})
NO_ROUTE = "none"
METHODS = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD"})
DURATION_BUCKETS = (0.1, 0.5, 1)
FINE_DURATION_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)  # fmt: skip


class HttpMetrics:
    """ASGI middleware: one count and one duration, in seconds, for each request, when its last byte is sent."""

    def __init__(self, app: Any, *, registry: CollectorRegistry) -> None:
        self.app = app
        self._requests = Counter(
            "http_requests", "HTTP requests, by route, method and class of status.", ("method", "status", "handler"),
            registry=registry,
        )  # fmt: skip
        self._durations = Histogram(
            "http_request_duration_seconds", "Time to the last byte.", ("method", "handler"),
            buckets=DURATION_BUCKETS, registry=registry,
        )  # fmt: skip
        self._fine_durations = Histogram(
            "http_request_duration_highr_seconds", "Time to the last byte, of all routes.",
            buckets=FINE_DURATION_BUCKETS, registry=registry,
        )  # fmt: skip
        # As announced by Content-Length; 0 where none is, as in a stream.
        self._request_bytes = Summary(
            "http_request_size_bytes", "Bytes of bodies sent.", ("handler",), registry=registry
        )
        self._response_bytes = Summary(
            "http_response_size_bytes", "Bytes of bodies answered.", ("handler",), registry=registry
        )
        self._known: dict[tuple[str, str, str], Callable[[float, int, int], None]] = {}  # by labels: few

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        try:
            await self.app(scope, receive, send)
        finally:
            status = scope.get("minivllm.status", 500)  # as `RequestId`, which is around this, has seen it
            handler = getattr(scope.get("route"), "path", NO_ROUTE)
            if handler not in NOT_COUNTED:
                method = scope["method"] if scope["method"] in METHODS else "other"
                labels = method, f"{status // 100}xx", handler
                count = self._known.get(labels) or self._known.setdefault(labels, self._counter(*labels))
                sizes = content_length(scope["headers"]), scope.get("minivllm.num_bytes", 0)
                count(time.perf_counter() - began, *sizes)

    def _counter(self, method: str, status: str, handler: str) -> Callable[[float, int, int], None]:
        """What counts a request of these labels: its seconds, bytes sent, bytes answered. Looking up takes time."""
        inc = self._requests.labels(method, status, handler).inc
        observe_duration = self._durations.labels(method, handler).observe
        observe_request = self._request_bytes.labels(handler).observe
        observe_response = self._response_bytes.labels(handler).observe

        def count(duration_s: float, num_request_bytes: int, num_response_bytes: int) -> None:
            inc()
            observe_duration(duration_s)
            self._fine_durations.observe(duration_s)
            observe_request(num_request_bytes)
            observe_response(num_response_bytes)

        return count


def content_length(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """What a message's headers announce; 0: nothing, or no number."""
    for name, value in headers:
        if name.lower() == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0
