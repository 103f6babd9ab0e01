"""What the benchmarks say of a list of numbers, and how they print and save it."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivllm.exceptions import ConfigError
from minivllm.version import __version__

WIDTH = 50
_LABEL_WIDTH = 40


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of them lie, interpolated linearly; nan of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(values: Sequence[float], percents: Sequence[float] = (99,)) -> dict[str, float]:
    """mean, median, std (of the population, as numpy's) and percentiles p99, …."""
    return {
        "mean": statistics.fmean(values) if values else math.nan,
        "median": percentile(values, 50),
        "std": statistics.pstdev(values) if values else math.nan,
        **{f"p{percent:g}": percentile(values, percent) for percent in percents},
    }


def title(text: str, fill: str) -> str:
    return f" {text} ".center(WIDTH, fill) if fill == "=" else text.center(WIDTH, fill)


def row(label: str, value: Any) -> str:
    return f"{label:<{_LABEL_WIDTH}} {f'{value:.2f}' if isinstance(value, float) else value:<10}".rstrip()


def machine() -> dict[str, Any]:
    """Where a number comes from, to be saved beside it."""
    return {
        "minivllm": __version__,
        "python": platform.python_version(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
    }


def save(path: str | Path, result: dict[str, Any], *, append: bool = False) -> None:
    """Write a result as JSON; what is no number there (nan) becomes null. append: as one more line of the file.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if append:
            with Path(path).open("a") as file:
                file.write(json.dumps(_jsonable(result)) + "\n")
        else:
            Path(path).write_text(json.dumps(_jsonable(result), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
