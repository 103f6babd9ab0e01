"""HTTP requests counted under the names of prometheus-fastapi-instrumentator, which vLLM's dashboards use.

Labels hold the route's template, never what a client wrote. Probes and scrapers are not counted.
"""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

NOT_COUNTED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", "/server_info"})
NO_ROUTE = "none"
METHODS = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD"})
DURATION_BUCKETS = (0.1, 0.5, 1)


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
                self._requests.labels(method, f"{status // 100}xx", handler).inc()
                self._durations.labels(method, handler).observe(time.perf_counter() - began)
