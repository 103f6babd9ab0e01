"""What the live view shows: the engine's numbers, read while somebody watches, once for all who do.

Owns when the engine is asked. No text of a request passes here: an `EngineSnapshot` has none.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import msgspec

from minivllm.entrypoints.openai.errors import ErrorInfo, error_info
from minivllm.entrypoints.openai.lifecycle import Lifecycle
from minivllm.entrypoints.openai.sse import NamedEventStream
from minivllm.exceptions import QueueFullError
from minivllm.messages.stats import BLOCK_CACHED, BLOCK_EMPTY, BLOCK_HELD, BLOCK_SHARED, EngineSnapshot

if TYPE_CHECKING:
    from minivllm.engine.async_llm import AsyncLLM

PERIOD_S = 0.25  # between two readings, at least
MAX_WATCHERS = 100


class EngineView(msgspec.Struct):
    """An `EngineSnapshot` as JSON. `blocks` is a letter a block, with a number behind it when several follow that are
    alike: e empty, c cached, h held, s shared; "h2e40s" are 43 blocks."""

    num_running_reqs: int
    num_waiting_reqs: int
    kv_cache_usage: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    num_blocks: int
    block_stride: int
    blocks: str


class StateEvent(msgspec.Struct, tag_field="type", tag="state"):
    time: float  # seconds on this server's clock, to make rates of the counters
    block_size: int  # tokens
    max_num_seqs: int
    engines: list[EngineView]


class ErrorEvent(msgspec.Struct, tag_field="type", tag="error"):
    error: ErrorInfo


class EngineFeed:
    """Readings of the engine for those who watch it. On the event loop's thread."""

    def __init__(self, engine: AsyncLLM, lifecycle: Lifecycle, period_s: float = PERIOD_S) -> None:
        self._engine = engine
        self._lifecycle = lifecycle
        self._period_s = period_s
        self._num_watchers = 0
        self._reader: asyncio.Task[None] | None = None
        self._next: asyncio.Future[StateEvent] | None = None

    async def stream(self, request_id: str) -> NamedEventStream:
        """The response that sends readings until its client goes.

        Raises:
            QueueFullError: too many watch already; EngineDeadError: there is nothing to see any more.
        """
        if self._num_watchers >= MAX_WATCHERS:
            raise QueueFullError(f"{MAX_WATCHERS} clients watch the engine already; try again later", reason="watchers")
        return await NamedEventStream(
            self.watch(),
            request_id=request_id,
            lifecycle=self._lifecycle,
            keep_alive_s=0,
            failure=lambda error: ErrorEvent(error_info(error)),
        ).start()

    async def watch(self) -> AsyncGenerator[StateEvent, None]:
        """Readings as they come; who is slower than they are misses some.

        Raises:
            EngineDeadError, EngineError: a reading failed.
        """
        self._num_watchers += 1
        try:
            while True:
                if self._reader is None or self._reader.done():
                    self._next = asyncio.get_running_loop().create_future()
                    self._reader = asyncio.ensure_future(self._read(self._next))
                yield await asyncio.shield(self._next)
        finally:
            self._num_watchers -= 1
            if self._num_watchers == 0 and self._reader is not None:
                self._reader.cancel()
                self._reader = None

    async def _read(self, awaited: asyncio.Future[StateEvent]) -> None:
        """Take readings, each for all who wait for it then; the first that fails is the last."""
        while True:
            try:
                event = await self._take()
            except Exception as error:
                awaited.set_exception(error)
                awaited.exception()  # asyncio logs what nobody has looked at, and all who waited may have left
                return
            self._next = asyncio.get_running_loop().create_future()
            awaited.set_result(event)
            awaited = self._next
            await asyncio.sleep(self._period_s)

    async def _take(self) -> StateEvent:
        snapshots = await self._engine.snapshots()
        ready = self._engine.ready
        return StateEvent(time.monotonic(), ready.block_size, ready.max_num_seqs, [_view(s) for s in snapshots])


_LETTERS = bytes.maketrans(bytes([BLOCK_EMPTY, BLOCK_CACHED, BLOCK_HELD, BLOCK_SHARED]), b"echs")
_RUN = re.compile(rb"(.)\1+")


def _view(snapshot: EngineSnapshot) -> EngineView:
    letters = snapshot.blocks.translate(_LETTERS)
    blocks = _RUN.sub(lambda run: b"%b%d" % (run[1], len(run[0])), letters).decode()
    return EngineView(**{**msgspec.structs.asdict(snapshot), "blocks": blocks})
