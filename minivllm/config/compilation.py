"""Which decode steps are captured as graphs, on a GPU: vLLM's options as far as they mean something here.

Nothing is compiled (`torch.compile` is not used), and prefill is never captured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from minivllm.exceptions import ConfigError

_MODES = ("FULL_DECODE_ONLY", "NONE")


@dataclass(frozen=True)
class CompilationConfig:
    cudagraph_capture_sizes: list[int] | None = None
    """On a GPU: the numbers of requests that decode steps are captured for. A step of fewer is padded to the next size,
    one of more than the largest runs without a graph. Default: 1, 2, 4, 8, then steps of 8 or, if that is more, of an
    eighth at most, up to max_num_seqs or 512. --enforce-eager captures none."""
    max_cudagraph_capture_size: int | None = None
    """On a GPU: the largest of the default sizes, in place of 512."""
    cudagraph_capture_at_start: bool = False
    """On a GPU: capture every size before the first request is taken, and show how far it is; a start then lasts some
    seconds longer. Without it a size is captured when a batch first has it, which holds that step up by tenths of a
    second."""
    compilation_config: dict[str, Any] | None = field(default=None, metadata={"short": "-cc"})
    """vLLM's JSON object, of which these keys are taken: cudagraph_capture_sizes, max_cudagraph_capture_size,
    cudagraph_mode (FULL_DECODE_ONLY, which is so anyway, or NONE, as --enforce-eager) and mode (0, no torch.compile,
    which is so anyway)."""


class _Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What --compilation-config may say."""

    cudagraph_capture_sizes: list[int] | None = None
    max_cudagraph_capture_size: int | None = None
    cudagraph_mode: str | None = None
    mode: int | str | None = None


@dataclass(frozen=True)
class CaptureOptions:
    """What was asked for, wherever it was said."""

    sizes: tuple[int, ...] | None = None  # ascending; None: the default ones
    largest: int | None = None  # of the default ones
    is_off: bool = False
    at_start: bool = False  # all of them before the first request

    @property
    def asks_for_graphs(self) -> bool:
        return self.sizes is not None or self.largest is not None or self.at_start


def read_compilation(config: CompilationConfig, *, enforce_eager: bool = False) -> CaptureOptions:
    """Check what the user gave; enforce_eager is ModelConfig's.

    Raises:
        ConfigError: a key is unknown, a value wrong, or two values contradict each other; the message names them.
    """
    try:
        keys = msgspec.convert(config.compilation_config or {}, _Keys)
    except msgspec.ValidationError as error:
        raise ConfigError(f"compilation_config: {error}".replace("`", "")) from None
    if keys.mode not in (None, 0, "0", "NONE"):
        raise ConfigError(f"compilation_config: mode={keys.mode} asks for torch.compile, which is not used here; say 0")
    if keys.cudagraph_mode not in (None, *_MODES):
        raise ConfigError(
            f"compilation_config: cudagraph_mode={keys.cudagraph_mode} is not served: decode steps are captured whole "
            f"or not at all; say {' or '.join(_MODES)}"
        )
    sizes = _either("cudagraph_capture_sizes", config.cudagraph_capture_sizes, keys.cudagraph_capture_sizes)
    largest = _either("max_cudagraph_capture_size", config.max_cudagraph_capture_size, keys.max_cudagraph_capture_size)
    if sizes is not None:
        if not sizes or min(sizes) < 1:
            raise ConfigError(
                f"cudagraph_capture_sizes={sizes} must be numbers of at least 1; for none: --enforce-eager"
            )
        if largest not in (None, max(sizes)):
            raise ConfigError(
                f"max_cudagraph_capture_size={largest} is not the largest of cudagraph_capture_sizes={sizes}; give one"
            )
    elif largest is not None and largest < 1:
        raise ConfigError(f"max_cudagraph_capture_size={largest} must be at least 1; for no graphs: --enforce-eager")
    is_off = enforce_eager or keys.cudagraph_mode == "NONE"
    sizes = None if sizes is None else tuple(sorted(set(sizes)))
    options = CaptureOptions(sizes, largest, is_off, config.cudagraph_capture_at_start)
    if is_off and options.asks_for_graphs:
        named = "--enforce-eager" if enforce_eager else "compilation_config: cudagraph_mode=NONE"
        raise ConfigError(
            f"{named} captures no graphs, and cudagraph_capture_sizes, max_cudagraph_capture_size or "
            "cudagraph_capture_at_start asks for some; leave one out"
        )
    return options


def _either(name: str, flag: Any, key: Any) -> Any:
    """The one that is given."""
    if flag is not None and key is not None and flag != key:
        raise ConfigError(f"{name}={flag} and compilation_config's {name}={key} contradict each other; give one")
    return key if flag is None else flag
