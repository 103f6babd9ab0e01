"""Whether the server takes work, how much of it is open, and when open answers must end.

    serving ── begin_drain ─▶ draining ── close ─▶ closing

Knows nothing of sockets, signals or engines: the launcher moves it, routes and streams look at it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator


class Lifecycle:
    def __init__(self) -> None:
        self.draining = False
        self.num_open = 0
        self.num_loading = 0  # of these, what GET /load counts
        self._closing = False
        self._closers: set[Callable[[], None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def on_close(self, call: Callable[[], None]) -> Callable[[], None]:
        """Have something called once open answers must end: soon, if that is so already. Returns it, for `forget`."""
        self._closers.add(call)
        if self._closing:
            asyncio.get_running_loop().call_soon(self._close_one, call)
        return call

    def forget(self, call: Callable[[], None]) -> None:
        self._closers.discard(call)

    def _close_one(self, call: Callable[[], None]) -> None:
        if call in self._closers:  # not forgotten meanwhile
            call()

    def begin_drain(self) -> None:
        """Take no new work; what is open goes on."""
        self.draining = True

    def close(self) -> None:
        """End what is open, now."""
        self.draining = True
        if not self._closing:
            self._closing = True
            for call in list(self._closers):
                call()

    @contextlib.contextmanager
    def open_request(self) -> Iterator[None]:
        """Count a request as open until its last byte is sent."""
        self.num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if self.num_open == 0:
                self._idle.set()

    def unload(self) -> None:
        """One that GET /load counts has been answered."""
        self.num_loading -= 1

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is open; False when it took too long."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self.num_open == 0
