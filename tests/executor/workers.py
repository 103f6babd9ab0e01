"""A worker without a model, for executors that want a `Worker`; and executors that use it."""

from __future__ import annotations

import os
import signal
import threading

from minivllm.config.engine import EngineConfig
from minivllm.exceptions import ModelFilesError
from minivllm.executor.ray import RayExecutor
from minivllm.executor.uniproc import UniProcExecutor
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput, WorkerReady
from tests.fakes import FakeWorker


class PlainWorker:
    """`worker.Worker`'s seam over a FakeWorker. A prompt may ask for trouble by its first token."""

    RAISE, DIE, WAIT = 13, 14, 15
    is_asynchronous = False

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.may_go_on = threading.Event()

    def initialize(self, on_progress) -> WorkerReady:
        if self.config.model.model == "broken":
            raise ModelFilesError("model.norm.weight has shape [63], expected [64]")
        on_progress("pretending to load")
        self.worker = FakeWorker(num_blocks=64, block_size=16, vocab_size=self.config.hf_config.vocab_size)
        num_plans = self.config.scheduler.max_plans_in_flight(leaves_host_free=False)
        return WorkerReady(256, 64, 16, 1024, 16, 256, "fake", "fake", plans_in_flight=num_plans)

    def execute_model(self, plan: SchedulerOutput) -> None:
        first_tokens = {new.prompt_token_ids[0] for new in plan.scheduled_new_reqs}
        if self.DIE in first_tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.WAIT in first_tokens:
            assert self.may_go_on.wait(60)
        self.result = self.worker.run(plan)
        if self.RAISE in first_tokens:
            raise ValueError("the model met its poison")

    def sample_tokens(self, grammar: GrammarOutput | None) -> ModelRunnerOutput:
        return self.result

    def echo(self, value):
        return value

    def shutdown(self) -> None:
        pass


class PlainUniExecutor(UniProcExecutor):
    """The in-process executor over a PlainWorker."""

    def new_worker(self) -> PlainWorker:
        return PlainWorker(self.config)


class PlainRayExecutor(RayExecutor):
    """The Ray executor over a PlainWorker."""

    worker_class = "tests.executor.workers:PlainWorker"
