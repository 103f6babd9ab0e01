"""Who comes before whom. A policy is an order of all requests, waiting and running alike.

The first waits least and runs first; the last is preempted first. A request keeps its place for life, so one that was
preempted waits where it belongs: before all that arrived after it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from minivllm.core.request import Request

# A request and its number in order of acceptance, to its place: lower is first, and no two are equal.
POLICIES: dict[str, Callable[[Request, int], tuple]] = {
    "fcfs": lambda request, number: (number,),
    "priority": lambda request, number: (request.priority, request.arrival_time, number),
}


def _order(request: Request) -> tuple:
    return request.order


def insert_in_order(requests: list[Request], request: Request) -> None:
    """Put a request into a list that is in order."""
    insort(requests, request, key=_order)


class RequestQueue:
    """Waiting requests, in order. Any may leave, for aborts come from the middle."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Wait, for the first time or again."""
        insert_in_order(self._requests, request)

    def peek(self) -> Request:
        """Who is next. The queue must not be empty."""
        return self._requests[0]

    def remove(self, request: Request) -> None:
        index = bisect_left(self._requests, request.order, key=_order)
        assert self._requests[index] is request, f"{request.request_id} does not wait"
        del self._requests[index]
