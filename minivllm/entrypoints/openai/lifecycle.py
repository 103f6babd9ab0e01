"""Whether the server takes work, how much of it is open, and when open answers must end.

    serving ── begin_drain ─▶ draining ── close ─▶ closing

Knows nothing of sockets, signals or engines: the launcher moves it, routes and streams look at it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Lifecycle:
    def __init__(self) -> None:
        self.draining = False
        self.num_open = 0
        self.num_loading = 0  # of these, what GET /load counts
        self._closing: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def closing(self) -> asyncio.Future[None]:
        """Done once open answers must end. Wait on it beside other things; never cancel it."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
        return self._closing

    def begin_drain(self) -> None:
        """Take no new work; what is open goes on."""
        self.draining = True

    def close(self) -> None:
        """End what is open, now."""
        self.draining = True
        if not self.closing.done():
            self.closing.set_result(None)

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
