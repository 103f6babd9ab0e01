"""The worker in the engine core's own process: every verb is a call, every future is done."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from minivllm.executor.abstract import Executor
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput, WorkerReady

if TYPE_CHECKING:
    from minivllm.worker.worker import Worker


class UniProcExecutor(Executor):
    """One worker, called directly."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.worker: Worker | None = None

    def initialize(self) -> WorkerReady:
        self.on_progress("importing torch")
        from minivllm.worker.worker import Worker  # torch comes with it

        self.worker = Worker(self.config)
        return self.worker.initialize(self.on_progress)

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        return _completed(self.worker.execute_model, plan)

    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        return _completed(self.worker.sample_tokens, grammar)

    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        return [getattr(self.worker, method)(*args)]

    def shutdown(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.shutdown()


def _completed(call: Callable[..., Any], *args: Any) -> Future:
    """A future that holds what the call gave, or raised."""
    future: Future = Future()
    try:
        future.set_result(call(*args))
    except Exception as error:
        future.set_exception(error)
    return future
