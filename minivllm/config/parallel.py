"""Which processes run the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelConfig:
    distributed_executor_backend: str = "uni"
    """uni: the worker lives in the engine core's process; ray: one actor in a placement group; or an Executor of your
    own, as module:Class."""
    disable_frontend_multiprocessing: bool = False
    """Run the engine core inside this process (`LLM` only; the API server never loads torch, and says so)."""
