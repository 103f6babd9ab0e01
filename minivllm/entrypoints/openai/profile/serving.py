"""A recording of what the engine does: the worker's own, by torch, and this process's, by cProfile."""

from __future__ import annotations

import asyncio
import cProfile
import io
import pstats
import time
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm.config.profiler import ProfilerConfig
from minivllm.exceptions import ConflictError, RequestError

if TYPE_CHECKING:
    from minivllm.engine.async_llm import AsyncLLM

_MOST_ROWS = 60  # of the table of functions


class ServingProfile:
    """One recording at a time. This process's covers the thread of the event loop."""

    def __init__(self, engine: AsyncLLM, config: ProfilerConfig) -> None:
        self._engine = engine
        self._config = config
        self._front: cProfile.Profile | None = None
        self._name = ""
        self._is_on = False

    async def start(self, prefix: str, delay: int | None, most: int | None) -> None:
        """Raises:
        RequestError: the server has no place to write to; ConflictError: a recording is underway.
        """
        if not self._config.is_on:
            raise RequestError(
                "this server has no profiler; start it with --profiler-config.torch_profiler_dir DIRECTORY"
            )
        if self._is_on or not await self._engine.start_profile(prefix, delay, most):
            raise ConflictError("a profile is being recorded; POST /stop_profile ends it")
        self._is_on = True
        self._name = f"{prefix or 'profile'}_api_server.{time.time_ns() // 1_000_000}"
        if not self._config.ignore_frontend:
            self._front = cProfile.Profile()
            self._front.enable()

    async def stop(self) -> list[str]:
        """The files written.

        Raises:
            ConflictError: nothing is being recorded.
        """
        if not self._is_on:
            raise ConflictError("no profile is being recorded; POST /start_profile begins one")
        self._is_on = False
        front, self._front = self._front, None
        files = []
        if front is not None:
            front.disable()
            files = await asyncio.to_thread(self._write, front)
        return await self._engine.stop_profile() + files

    def _write(self, front: cProfile.Profile) -> list[str]:
        directory = Path(self._config.torch_profiler_dir)
        directory.mkdir(parents=True, exist_ok=True)
        dump, table = directory / f"{self._name}.pstats", directory / f"{self._name}.txt"
        front.dump_stats(dump)
        text = io.StringIO()
        pstats.Stats(front, stream=text).sort_stats("tottime").print_stats(_MOST_ROWS)
        table.write_text(text.getvalue())
        return [str(dump), str(table)]
