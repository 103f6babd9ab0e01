"""The contract of every executor: the same plans give the same results, failures have causes, nothing is left."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from minivllm.config.cpu import CpuConfig
from minivllm.config.scheduler import SchedulerConfig
from minivllm.exceptions import ConfigError
from minivllm.executor.abstract import EXECUTORS, Executor, get_executor_class
from minivllm.executor.ray import _num_cpus
from minivllm.executor.ray_worker import RayWorker, Reply
from minivllm.messages.codec import Decoder, encode
from minivllm.messages.worker import NewRequestData, SchedulerOutput
from minivllm.sampling_params import SamplingParams
from minivllm.utils import native
from tests.engine.engines import make_config
from tests.executor.workers import PlainRayExecutor, PlainUniExecutor, PlainWorker


class Deaths(list):
    """What the death callback was told; `wait` until it was."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def __call__(self, cause: str) -> None:
        self.append(cause)
        self.told.set()


def start(executor_class: type[Executor], *, is_async: bool = False) -> tuple[Executor, Deaths]:
    deaths = Deaths()
    config = replace(make_config(), scheduler=SchedulerConfig(async_scheduling=is_async))
    return executor_class(config, on_death=deaths, on_progress=lambda phase: None), deaths


@pytest.fixture(
    scope="module",
    params=[(PlainUniExecutor, False), (PlainUniExecutor, True), (PlainRayExecutor, True)],
    ids=["uni", "uni-async", "ray"],
)
def executor(request, tmp_path_factory) -> Iterator[Executor]:
    """One started executor for all that leaves it whole: a Ray cluster takes seconds to start."""
    run_dir: Path = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.setenv("MINIVLLM_RUN_DIR", str(run_dir))
    patch.delenv("RAY_ADDRESS", raising=False)
    executor_class, is_async = request.param
    if executor_class is PlainRayExecutor:
        if importlib.util.find_spec("ray") is None:
            pytest.skip('Ray is not installed: pip install "minivllm[ray]"')
    before = set(psutil.Process().children(recursive=True))
    executor, executor.deaths = start(executor_class, is_async=is_async)
    assert executor.max_concurrent_batches == (2 if is_async else 1)
    executor.ready = executor.initialize()
    executor.num_steps = 0
    yield executor
    if isinstance(executor, PlainRayExecutor):
        the_death_of_the_actor_is_told_at_once(executor)
    executor.shutdown()
    executor.shutdown()
    patch.undo()
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=20)
    assert alive == []
    assert list(run_dir.iterdir()) == []


def the_death_of_the_actor_is_told_at_once(executor: PlainRayExecutor) -> None:
    """Last, since nothing can follow it."""
    [actor] = [p for p in psutil.Process().children(recursive=True) if "RayWorker" in read_command_line(p)]
    os.kill(actor.pid, signal.SIGKILL)
    assert executor.deaths.told.wait(20)
    assert "Ray worker is gone" in executor.deaths[0]


def read_command_line(process: psutil.Process) -> str:
    """As it is shown; none of a process that has ended meanwhile, as others of Ray's may at any time."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # zombies are among them
        return ""


def give(executor: Executor, request_id: str, prompt: list[int]) -> tuple[Future, Future]:
    """Give it a plan with one new request; the futures of its forward pass and of its result."""
    new = NewRequestData(request_id, prompt, [], SamplingParams(ignore_eos=True), 7, [], [[0]], 0)
    plan = SchedulerOutput(
        executor.num_steps,
        [new],
        num_scheduled_tokens={request_id: len(prompt)},
        total_num_scheduled_tokens=len(prompt),
        finished_req_ids=getattr(executor, "known", []),
    )
    executor.num_steps, executor.known = executor.num_steps + 1, [request_id]
    return executor.execute_model(plan), executor.sample_tokens(None)


def step(executor: Executor, request_id: str, prompt: list[int]):
    """Run one new request's prompt; the result of the step."""
    executed, sampled = give(executor, request_id, prompt)
    executed.result()
    return sampled.result()


def test_it_gives_the_workers_sizes(executor):
    assert (executor.ready.max_model_len, executor.ready.block_size) == (256, 16)


def test_it_gives_the_workers_tokens(executor):
    result = step(executor, "a", [1, 2, 3])
    assert result.request_ids == ["a"]
    assert len(result.sampled_token_ids[0]) == 1
    again = step(executor, "b", [1, 2, 3])
    assert again.sampled_token_ids == result.sampled_token_ids


def test_a_plan_may_come_before_the_result_of_the_last_is_asked_for(executor):
    first, second = give(executor, "d", [1, 2, 3]), give(executor, "e", [1, 2, 3])
    results = [sampled.result() for executed, sampled in (first, second)]
    assert [result.request_ids for result in results] == [["d"], ["e"]]


def test_in_process_too_a_plan_runs_while_the_next_is_made():
    executor, _ = start(PlainUniExecutor, is_async=True)
    executor.initialize()
    executor.num_steps = 0
    executed, sampled = give(executor, "a", [PlainWorker.WAIT])
    assert not executed.done() and not sampled.done()
    executor.worker.may_go_on.set()
    assert sampled.result().request_ids == ["a"]
    executor.shutdown()


def test_a_failure_in_the_forward_pass_comes_with_its_cause_and_the_next_plan_runs(executor):
    with pytest.raises(Exception, match="the model met its poison"):
        step(executor, "bad", [PlainWorker.RAISE])
    assert step(executor, "c", [1]).request_ids == ["c"]


def test_a_call_reaches_every_worker(executor):
    assert executor.collective_rpc("echo", ([1, "two"],)) == [[1, "two"]]


def test_a_call_that_fails_says_why(executor):
    with pytest.raises(Exception, match="no_such_method"):
        executor.collective_rpc("no_such_method")


def test_every_executor_in_the_table_can_be_loaded():
    for name in EXECUTORS:
        assert issubclass(get_executor_class(name), Executor)


def test_a_start_that_fails_in_the_actor_keeps_its_exit_code():
    worker = RayWorker(encode(make_config(model="broken")), "tests.executor.workers:PlainWorker")
    reply = Decoder(Reply)(worker.initialize())
    assert reply.exit_code == 3 and "model.norm.weight" in reply.failure


@pytest.mark.parametrize("executor_class", [PlainUniExecutor, PlainRayExecutor])
def test_an_executor_that_was_never_started_has_nothing_to_end(executor_class: type[Executor]):
    executor, _ = start(executor_class)
    executor.shutdown()


@pytest.mark.skipif(native.lib is None, reason="no native extension here")
def test_the_actor_asks_for_as_many_processors_as_the_kernels_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native.lib, "num_threads", lambda: 7)  # as where a control group grants so much time
    assert _num_cpus(CpuConfig()) == 7
    assert _num_cpus(CpuConfig(cpu_threads=3)) == 3


def test_without_ray_the_message_is_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    executor, _ = start(PlainRayExecutor)
    with pytest.raises(ConfigError, match=r'pip install "minivllm\[ray\]"'):
        executor.initialize()
    executor.shutdown()
