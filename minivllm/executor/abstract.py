"""What EngineCore needs of whatever runs the model: five verbs and a death callback.

Owns the contract and the table of executors. A plan goes in by `execute_model`, its result comes out
of the future that `sample_tokens` returned for it; plans are answered in the order they were given.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future

from minivllm.config.engine import EngineConfig
from minivllm.exceptions import ConfigError
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput, WorkerReady

EXECUTORS = {
    "uni": "minivllm.executor.uniproc:UniProcExecutor",
    "ray": "minivllm.executor.ray:RayExecutor",
}


class Executor(ABC):
    """Runs plans on one or more workers.

    `on_death(cause)` may be called from any thread, once, when a worker is gone; `on_progress(phase)`
    from `initialize`'s thread.
    """

    # Plans given to it and not yet answered, at most; a subclass may take more, and `initialize` has the last word.
    max_concurrent_batches: int = 1

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_death: Callable[[str], None],
        on_progress: Callable[[str], None],
    ) -> None:
        self.config = config
        self.on_death = on_death
        self.on_progress = on_progress

    @abstractmethod
    def initialize(self) -> WorkerReady:
        """Load the model and lay out the KV cache.

        Raises:
            ConfigError, ModelFilesError: it cannot be served as asked.
        """

    @abstractmethod
    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        """Start the forward pass of a plan."""

    @abstractmethod
    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        """Sample for the oldest plan that was executed and not yet sampled; `grammar` says where not freely."""

    @abstractmethod
    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        """Call a method on every worker; one answer each, in rank order."""

    @abstractmethod
    def shutdown(self) -> None:
        """End the workers. A second call does nothing."""


def get_executor_class(backend: str) -> type[Executor]:
    """The executor of this name in the table, or of this "module:Class".

    Raises:
        ConfigError: there is none; the message lists the table.
    """
    target = EXECUTORS.get(backend, backend)
    module_name, _, class_name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name) if class_name else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--distributed-executor-backend {backend}: cannot load {target}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Executor)):
        raise ConfigError(
            f"--distributed-executor-backend {backend} is no executor; "
            f"choose one of {', '.join(EXECUTORS)}, or name a subclass of Executor as module:Class"
        )
    return found
