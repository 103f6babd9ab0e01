"""The order in which waiting requests are served. A policy is a queue."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from minivllm.core.request import Request


class FCFSRequestQueue:
    """First come, first served. Any request leaves in O(1), for aborts come from the middle."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def add(self, request: Request) -> None:
        """Wait for the first time."""
        self._requests[request.request_id] = request

    def requeue(self, request: Request) -> None:
        """Wait again, before all others: it arrived before them."""
        self._requests[request.request_id] = request
        self._requests.move_to_end(request.request_id, last=False)

    def peek(self) -> Request:
        """Who is next. The queue must not be empty."""
        return next(iter(self._requests.values()))

    def remove(self, request: Request) -> None:
        del self._requests[request.request_id]
