"""The worker in the engine core's own process, on its own thread if steps are to be planned meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from minivllm.executor.abstract import Executor
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput, WorkerReady

if TYPE_CHECKING:
    from minivllm.worker.worker import Worker


class _Done(Future):
    """A future of something that has happened. Nobody waits for it, so it has no lock, most of what one costs."""

    def __init__(self, value: Any, error: Exception | None = None) -> None:
        self._value, self._error = value, error

    def result(self, timeout: float | None = None) -> Any:
        if self._error is not None:
            raise self._error
        return self._value

    def exception(self, timeout: float | None = None) -> Exception | None:
        return self._error

    def done(self) -> bool:
        return True

    def add_done_callback(self, fn: Callable[[Future], Any]) -> None:
        fn(self)

    def cancel(self) -> bool:
        return False


class UniProcExecutor(Executor):
    """One worker. Every verb is a call, and every future done; under async scheduling the calls are made one after
    another by a thread of their own, which computes most of the time without Python's lock. Where the worker's device
    works while the host goes on, that thread goes on too, and another waits for the tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.worker: Worker | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._results: ThreadPoolExecutor | None = None
        if self.config.scheduler.async_scheduling:
            self.max_concurrent_batches = 2

    def initialize(self) -> WorkerReady:
        self.worker = self.new_worker()
        ready = self.worker.initialize(self.on_progress)
        self.max_concurrent_batches = ready.plans_in_flight
        if ready.plans_in_flight > 1:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker")
            if self.worker.is_asynchronous:
                self._results = ThreadPoolExecutor(max_workers=1, thread_name_prefix="results")
        return ready

    def new_worker(self) -> Worker:
        self.on_progress("importing torch")
        from minivllm.worker.worker import Worker  # torch comes with it

        return Worker(self.config)

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        return self._call(self.worker.execute_model, plan)

    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        if self._results is None:
            return self._call(self.worker.sample_tokens, grammar)
        started = self._call(self.worker.start_sampling, grammar)
        return self._results.submit(lambda: started.result().result())

    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        return [self._call(getattr(self.worker, method), *args).result()]

    def shutdown(self) -> None:
        """Ends when the step that runs has; those behind it are dropped."""
        for thread in (self._thread, self._results):
            if thread is not None:
                thread.shutdown(cancel_futures=True)
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.shutdown()

    def _call(self, call: Callable[..., Any], *args: Any) -> Future:
        """What the call gives or raises, when its turn has come."""
        if self._thread is not None:
            return self._thread.submit(call, *args)
        try:
            return _Done(call(*args))
        except Exception as error:
            return _Done(None, error)
