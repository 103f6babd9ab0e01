"""How the processors are used, where the model runs on them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from minivllm.exceptions import ConfigError

_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


@dataclass(frozen=True)
class CpuConfig:
    cpu_threads: int | None = None
    """Threads of the kernels; default: the processors this process may use, or fewer where a control group grants less
    time. Fewer help when something else runs on the machine."""
    cpu_bind: str = "none"
    """Where they run: none, wherever the system likes, but off the processor that the engine's own thread is on; auto,
    each on a processor of its own of those this process may use; or processors such as 0-3,8, to which the engine is
    confined."""


def read_cpu_bind(text: str) -> list[int] | None:
    """The processors to bind threads to, in order; None for none.

    Raises:
        ConfigError: it is no list of processors, or names one that this process may not use.
    """
    if text == "none":
        return None
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not usable:
        raise ConfigError(f"cpu_bind={text}: this system binds no threads; leave it out")
    if text == "auto":
        return usable
    processors: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f"cpu_bind={text}: {part!r} is no processor or range; say none, auto, or such as 0-3,8")
        processors += range(first, last + 1)
    for processor in processors:
        if processor not in usable:
            raise ConfigError(f"cpu_bind={text}: processor {processor} is not one this process may use ({usable})")
    return list(dict.fromkeys(processors))
