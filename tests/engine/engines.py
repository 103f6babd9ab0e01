"""Engines with a fake model, and executors that misbehave on request."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from minivllm.config.cache import CacheConfig
from minivllm.config.engine import EngineConfig
from minivllm.config.hf_config import HFConfig
from minivllm.config.model import ModelConfig
from minivllm.config.parallel import ParallelConfig
from minivllm.exceptions import ModelFilesError
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput, WorkerReady
from tests.fakes import FakeExecutor

FAKE = "tests.fakes:FakeExecutor"
VOCAB_SIZE = 64
POISON = 13  # a prompt that starts with this token makes a PoisonedExecutor fail


def make_config(executor: str = FAKE, *, max_model_len: int = 256, **model) -> EngineConfig:
    """A configuration without files: token ids in, token ids out, unless a tokenizer is named."""
    return EngineConfig(
        model=ModelConfig(
            **{"model": "fake", "skip_tokenizer_init": True, "max_model_len": max_model_len, **model}
        ),
        hf_config=HFConfig(
            architecture="FakeForCausalLM",
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=max_model_len,
        ),
        cache=CacheConfig(),
        parallel=ParallelConfig(distributed_executor_backend=executor),
    )


class PoisonedExecutor(FakeExecutor):
    """Raises in the step that first sees a poisoned prompt."""

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        if any(new.prompt_token_ids[0] == POISON for new in plan.scheduled_new_reqs):
            raise ValueError("the model met its poison")
        return super().execute_model(plan)


class FailingRowExecutor(FakeExecutor):
    """Fails the one request that is poisoned; the others go on."""

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        for new in plan.scheduled_new_reqs:
            if new.prompt_token_ids[0] == POISON:
                self.worker.failures[new.request_id] = "non-finite logits"
        return super().execute_model(plan)


class DyingWorkerExecutor(FakeExecutor):
    """Its worker dies, as an actor would, after the first step with work."""

    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        self.on_death("worker 0 was killed by SIGKILL")
        return super().sample_tokens(grammar)


class UnencodableExecutor(FakeExecutor):
    """Gives tokens that the scheduler takes and no message can hold."""

    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        future = super().sample_tokens(grammar)
        sampled = future.result().sampled_token_ids
        sampled[:] = [[np.int64(token_id) for token_id in token_ids] for token_ids in sampled]
        return future


class OneByOneExecutor(FakeExecutor):
    """Cannot take a plan while another runs."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.max_concurrent_batches = 1


class LateExecutor(FakeExecutor):
    """Runs a plan when its result is asked for, as one that is busy with the plan before."""

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        self._inline.results.append(Late(lambda: self.worker.run(plan)))
        return Late(lambda: None)


class PipelineExecutor(LateExecutor):
    """Three plans at once, as with so many stages."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.max_concurrent_batches = 3


class Late(Future):
    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__()
        self._run = run

    def result(self, timeout: float | None = None) -> Any:
        return self._run()


class BrokenModelExecutor(FakeExecutor):
    """Cannot start."""

    def initialize(self) -> WorkerReady:
        raise ModelFilesError(
            "model.norm.weight has shape [63], expected [64]; download the checkpoint again"
        )


class SlowlyEndingExecutor(BrokenModelExecutor):
    """Cannot start, and its process takes its time to end, as one does that has imported torch on a slow machine."""

    def initialize(self) -> WorkerReady:
        atexit.register(time.sleep, 1.5)
        return super().initialize()


class EndlessStartExecutor(FakeExecutor):
    """Has a model to load that is larger than our patience."""

    def initialize(self) -> WorkerReady:
        time.sleep(600)
        raise AssertionError("unreachable")


class CrashingStartExecutor(FakeExecutor):
    """Dies while it starts, without a word."""

    def initialize(self) -> WorkerReady:
        self.on_progress("loading weights")
        time.sleep(0.5)  # a real crash comes late enough for the socket's thread to have sent this
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")
