"""Whether, and where, the engine's work may be recorded while it serves."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from minivllm.exceptions import ConfigError


class ProfilerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of --profiler-config: vLLM's names."""

    profiler: Literal["torch"] | None = None  # None: torch once there is a directory
    torch_profiler_dir: str | None = None  # where files are put; made if it is not there
    torch_profiler_with_stack: bool = True  # Python's functions too
    torch_profiler_record_shapes: bool = False
    torch_profiler_with_memory: bool = False
    torch_profiler_with_flops: bool = False
    torch_profiler_use_gzip: bool = True
    ignore_frontend: bool = False  # record the worker alone
    delay_iterations: int = 0  # steps before it begins
    max_iterations: int = 0  # steps it lasts; 0: until it is stopped

    @property
    def is_on(self) -> bool:
        return self.torch_profiler_dir is not None


def read_profiler_config(values: dict[str, Any] | None) -> ProfilerConfig:
    """Check what the user gave.

    Raises:
        ConfigError: a key is unknown or its value wrong; the message names it.
    """
    try:
        config = msgspec.convert(values or {}, ProfilerConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"profiler_config: {error}".replace("`", "")) from None
    for name in ("delay_iterations", "max_iterations"):
        if getattr(config, name) < 0:
            raise ConfigError(f"profiler_config: {name}={getattr(config, name)} must be at least 0")
    if config.profiler is not None and not config.is_on:
        raise ConfigError("profiler_config: say where the files go: torch_profiler_dir")
    return config
