"""What is counted and logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ObservabilityConfig:
    disable_log_stats: bool = False
    """No periodic statistics line and no engine metrics."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    """Least severity of minivllm's own log lines."""
