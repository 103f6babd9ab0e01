"""Records what a worker does, step by step, with torch's profiler, into files.

A recording covers the thread that executes plans. It begins with a step, `delay_iterations` after it was asked for, and
ends when it is stopped, or after `max_iterations`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from minivllm.config.profiler import ProfilerConfig
from minivllm.logger import init_logger

logger = init_logger(__name__)

_MOST_ROWS = 60  # of the table of operations


class WorkerProfiler:
    def __init__(self, config: ProfilerConfig) -> None:
        self._config = config
        self._profile: torch.profiler.profile | None = None  # None: nothing is being recorded
        self._name: str | None = None  # of the files; None: nothing was asked for
        self._delay = self._num_left = 0
        self._files: list[str] = []

    def start(self, prefix: str, delay: int | None, most: int | None) -> bool:
        """Record from the next step but `delay`, for `most` steps; None: as configured. False: one is underway."""
        if self._name is not None:
            return False
        self._name = f"{prefix or 'profile'}_worker.{time.time_ns() // 1_000_000}"
        self._delay = self._config.delay_iterations if delay is None else delay
        self._num_left = self._config.max_iterations if most is None else most  # 0: no end
        self._files = []
        return True

    def before_step(self) -> None:
        """A step begins."""
        if self._name is None or self._profile is not None or self._files:  # nothing asked for, underway, or over
            return
        if self._delay:
            self._delay -= 1
            return
        config = self._config
        self._profile = torch.profiler.profile(
            activities=torch.profiler.supported_activities(),
            with_stack=config.torch_profiler_with_stack,
            record_shapes=config.torch_profiler_record_shapes,
            profile_memory=config.torch_profiler_with_memory,
            with_flops=config.torch_profiler_with_flops,
        )
        self._profile.start()

    def after_step(self) -> None:
        """A step has ended: perhaps the last to be recorded."""
        if self._profile is not None and self._num_left:
            self._num_left -= 1
            if not self._num_left:
                self._write()

    def stop(self) -> list[str]:
        """End the recording; the files of this one, none if no step came."""
        self._write()
        self._name = None
        return self._files

    def _write(self) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        profile.stop()
        directory = Path(self._config.torch_profiler_dir)
        directory.mkdir(parents=True, exist_ok=True)
        trace = directory / f"{self._name}.pt.trace.json{'.gz' if self._config.torch_profiler_use_gzip else ''}"
        profile.export_chrome_trace(str(trace))
        table = directory / f"{self._name}.txt"
        table.write_text(_table(profile))
        self._files = [str(trace), str(table)]
        logger.info("the worker's profile is in %s and %s", trace, table)


def _table(profile: Any) -> str:
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=_MOST_ROWS)
