"""EngineCore alone: what each client hears of each step."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from minivllm.config.scheduler import SchedulerConfig
from minivllm.config.structured_outputs import StructuredOutputsConfig
from minivllm.engine.core import EngineCore
from minivllm.engine.structured import LazyGrammars
from minivllm.exceptions import ConfigError, ConflictError, ModelFilesError
from minivllm.messages.engine import SLEEPING_PARTS, EngineCoreRequest, FinishReason, UtilityRequest
from minivllm.sampling_params import SamplingParams
from tests.core.test_grammar import FakeGrammars, constrained
from tests.engine.engines import POISON, make_config


def make_core(executor: str = "tests.fakes:FakeExecutor", **scheduling: Any) -> EngineCore:
    config = replace(make_config(executor), scheduler=SchedulerConfig(**scheduling))
    return EngineCore(config, on_death=lambda cause: None, on_progress=lambda phase: None)


def request(request_id: str, prompt=(1, 2, 3), *, client_index: int = 0, **params) -> EngineCoreRequest:
    params = SamplingParams(ignore_eos=True, **params)
    return EngineCoreRequest(request_id, list(prompt), params, seed=1, client_index=client_index)


def run(core: EngineCore) -> dict[str, list]:
    """Step to the end; each request's outputs."""
    heard: dict[str, list] = {}
    while core.has_requests():
        for message in core.step().values():
            for output in message.outputs:
                heard.setdefault(output.request_id, []).append(output)
    return heard


def answers(heard: dict[str, list]) -> dict[str, list[tuple]]:
    """All of the outputs but times."""
    return {i: [(o.new_token_ids, o.finish_reason, o.stop_reason) for o in outputs] for i, outputs in heard.items()}


def ends(outputs) -> list[FinishReason]:
    return [output.finish_reason for output in outputs if output.finish_reason is not None]


def test_every_client_hears_of_its_own_requests():
    core = make_core()
    core.add_request(request("a", max_tokens=1))
    core.add_request(request("b", max_tokens=1, client_index=1))
    messages = core.step()
    heard = {
        client: [output.request_id for output in message.outputs] for client, message in messages.items()
    }
    assert heard == {0: ["a"], 1: ["b"]}
    assert messages[0].scheduler_stats is not None and messages[1].scheduler_stats is None


def test_a_request_the_scheduler_refuses_is_answered_with_an_error():
    core = make_core()
    core.add_request(request("a", prompt=()))
    [output] = run(core)["a"]
    assert output.finish_reason is FinishReason.ERROR and "empty" in output.error


def test_a_failed_row_ends_that_request_alone():
    core = make_core("tests.engine.engines:FailingRowExecutor")
    core.add_request(request("good", max_tokens=5))
    core.add_request(request("bad", prompt=(POISON, 1), max_tokens=5))
    heard = run(core)
    assert ends(heard["bad"]) == [FinishReason.ERROR] and heard["bad"][-1].error == "non-finite logits"
    assert ends(heard["good"]) == [FinishReason.LENGTH] and len(heard["good"]) == 5


def test_an_abort_that_arrives_during_the_step_wins_over_its_result():
    core = make_core()
    core.add_request(request("a", max_tokens=1))
    [output] = core.step(lambda: core.abort_requests(["a"]))[0].outputs
    assert (output.finish_reason, output.new_token_ids) == (FinishReason.ABORT, [])
    assert run(core) == {}


def test_after_an_abort_the_statistics_say_that_nothing_runs():
    core = make_core()
    core.add_request(request("a", max_tokens=50))
    assert core.step()[0].scheduler_stats.num_running_reqs == 1
    core.abort_requests(["a"])
    assert core.has_requests()
    assert core.step()[0].scheduler_stats.num_running_reqs == 0


# Several plans in flight

LATE, PIPELINE = "tests.engine.engines:LateExecutor", "tests.engine.engines:PipelineExecutor"


@pytest.mark.parametrize("executor", [LATE, PIPELINE])
def test_with_plans_in_flight_everyone_is_answered_as_without(executor: str):
    sync, ahead = make_core(), make_core(executor, async_scheduling=True)
    for core in (sync, ahead):
        for i in range(6):
            stop_token_ids = list(range(0, 64, 9))
            core.add_request(
                request(f"r{i}", range(5 + 9 * i), max_tokens=1 + 4 * i, stop_token_ids=stop_token_ids)
            )
    one_by_one, overlapped = run(sync), run(ahead)
    assert answers(overlapped) == answers(one_by_one)
    assert {str(end) for outputs in overlapped.values() for end in ends(outputs)} == {"stop", "length"}


def test_the_next_step_is_planned_before_the_result_of_this_one_is_asked_for():
    core = make_core(LATE, async_scheduling=True)
    core.add_request(request("a", max_tokens=3))
    planned_at = []
    schedule = core.scheduler.schedule
    core.scheduler.schedule = lambda now: planned_at.append(len(core.executor.worker.states)) or schedule(now)
    core.step()
    assert planned_at == [0, 0]  # both before the worker had heard of anybody
    assert len(run(core)["a"]) == 2  # the rest


def test_an_abort_during_a_step_also_discards_what_the_next_one_computes():
    core = make_core(LATE, async_scheduling=True)
    core.add_request(request("a", max_tokens=9))
    core.step()
    [output] = core.step(lambda: core.abort_requests(["a"]))[0].outputs
    assert (output.finish_reason, output.new_token_ids) == (FinishReason.ABORT, [])
    assert run(core) == {}
    assert not core.executor.worker.states and core.scheduler.kv_cache.pool.usage == 0


def test_an_id_may_be_used_again_while_a_plan_with_the_first_of_that_name_is_in_flight():
    alone = make_core()
    alone.add_request(request("a", [9, 9], max_tokens=5))
    core = make_core(PIPELINE, async_scheduling=True)
    core.add_request(request("a", max_tokens=9))
    core.step()
    core.abort_requests(["a"])
    core.add_request(request("a", [9, 9], max_tokens=5))
    assert [o.finish_reason for o in core.step()[0].outputs] == [FinishReason.ABORT]
    assert answers(run(core)) == answers(run(alone))


def test_a_failed_row_with_a_plan_behind_it_ends_that_request_alone():
    core = make_core("tests.engine.engines:FailingRowExecutor", async_scheduling=True)
    core.add_request(request("good", max_tokens=5))
    core.add_request(request("bad", prompt=(POISON, 1), max_tokens=5))
    heard = run(core)
    assert ends(heard["bad"]) == [FinishReason.ERROR] and len(heard["bad"]) == 1
    assert ends(heard["good"]) == [FinishReason.LENGTH] and len(heard["good"]) == 5


@pytest.mark.parametrize("executor", [LATE, PIPELINE])
def test_a_mask_is_made_of_all_tokens_before_and_holds_nobody_up(executor: str):
    core = make_core(executor, async_scheduling=True)
    core.scheduler._grammars = FakeGrammars()
    plans: list[set[str]] = []
    masks: list[list[int]] = []  # of each plan, how many tokens a mask was made of
    execute_model, sample_tokens = core.executor.execute_model, core.executor.sample_tokens

    def execute(plan):
        plans.append(set(plan.num_scheduled_tokens))
        return execute_model(plan)

    def sample(grammar):
        masks.append(list(grammar.bitmask[::4]) if grammar is not None else [])
        return sample_tokens(grammar)

    core.executor.execute_model, core.executor.sample_tokens = execute, sample
    core.add_request(constrained("a", "4", max_tokens=9))
    core.add_request(request("b", max_tokens=9))
    heard = run(core)
    assert ends(heard["a"]) == [FinishReason.STOP] and len(heard["a"]) == 4
    assert ends(heard["b"]) == [FinishReason.LENGTH] and len(heard["b"]) == 9
    assert masks[:4] == [[0], [1], [2], [3]] and not any(masks[4:])
    assert plans[:4] == [{"a", "b"}] * 4  # in one step each
    assert len([names for names in plans if names]) == 9


def test_an_executor_that_takes_one_plan_at_a_time_refuses_to_schedule_ahead():
    with pytest.raises(ConfigError, match="--async-scheduling needs an executor .* OneByOneExecutor does not"):
        make_core("tests.engine.engines:OneByOneExecutor", async_scheduling=True)


def test_abort_all_answers_everyone_once():
    core = make_core()
    for name in "abc":
        core.add_request(request(name, max_tokens=50))
    core.step()
    outputs = core.abort_all()[0].outputs
    assert sorted((o.request_id, str(o.finish_reason)) for o in outputs) == [
        (name, "abort") for name in "abc"
    ]


def test_only_listed_utilities_can_be_called():
    core = make_core()
    assert core.call_utility(UtilityRequest(1, "reset_prefix_cache")).result is True
    assert "no utility 'shutdown'" in core.call_utility(UtilityRequest(2, "shutdown")).failure


def test_an_executor_that_is_none_is_a_config_error():
    with pytest.raises(ConfigError, match="uni, ray"):
        make_core("threads")
    with pytest.raises(ConfigError, match="cannot load"):
        make_core("tests.fakes:NoSuchExecutor")


def test_what_the_worker_finds_wrong_comes_through():
    with pytest.raises(ModelFilesError, match=r"model\.norm\.weight"):
        make_core("tests.engine.engines:BrokenModelExecutor")


@pytest.mark.parametrize("scheduling", [{}, {"async_scheduling": True}])
def test_requests_that_are_kept_sleep_and_go_on_with_the_same_tokens(scheduling: dict):
    """So do those that come meanwhile; nothing is computed between."""
    asked = [request(f"r{i}", prompt=(i + 1, 2, 3) * 9, max_tokens=20, logprobs=1) for i in range(4)]
    calm, sleepy = make_core(**scheduling), make_core(**scheduling)
    for each in asked:
        calm.add_request(each)
    expected = answers(run(calm))
    heard: dict[str, list] = {}

    def step() -> None:
        for message in sleepy.step().values():
            for output in message.outputs:
                heard.setdefault(output.request_id, []).append(output)

    for each in asked[:3]:
        sleepy.add_request(each)
    for _ in range(5):
        step()
    sleepy.sleep(1, abort=False)
    while sleepy.has_requests():  # what was in flight is told
        step()
    before = {i: len(outputs) for i, outputs in heard.items()}
    assert sleepy.is_sleeping() and sleepy.scheduler.kv_cache.pool.usage == 0
    sleepy.add_request(asked[3])
    assert not sleepy.has_requests()
    assert sleepy.wake_up(["weights"]) is False and not sleepy.has_requests()
    assert sleepy.wake_up(["kv_cache"]) is True and not sleepy.is_sleeping()
    assert {i: len(outputs) for i, outputs in heard.items()} == before
    for i, outputs in run(sleepy).items():
        heard.setdefault(i, []).extend(outputs)
    flat = {i: [t for o in outputs for t in o[0]] for i, outputs in answers(heard).items()}
    assert flat == {i: [t for o in outputs for t in o[0]] for i, outputs in expected.items()}
    assert all(ends(outputs) == [FinishReason.LENGTH] for outputs in heard.values())


def test_asleep_all_can_be_aborted_and_statistics_tell_the_level():
    core = make_core()
    core.add_request(request("a", max_tokens=5))
    core.add_request(request("b", max_tokens=5, client_index=1))
    core.step()
    core.sleep(2, abort=True)
    messages = core.step()
    assert {client: ends(message.outputs) for client, message in messages.items()} == {
        0: [FinishReason.ABORT], 1: [FinishReason.ABORT],
    }  # fmt: skip
    assert messages[0].scheduler_stats.sleep_level == 2
    core.add_request(request("c", max_tokens=5))
    core.abort_requests(["c"])
    assert ends(run(core)["c"]) == [FinishReason.ABORT]
    core.wake_up(["weights", "kv_cache"])
    assert core.step()[0].scheduler_stats.sleep_level == 0
    core.add_request(request("d", max_tokens=3))
    assert ends(run(core)["d"]) == [FinishReason.LENGTH]


@pytest.mark.parametrize("scheduling", [{}, {"async_scheduling": True}])
def test_the_cache_of_running_requests_is_reset_too_when_asked(scheduling: dict):
    asked = [request(f"r{i}", prompt=(i + 1, 2, 3) * 9, max_tokens=20) for i in range(3)]
    calm, reset = make_core(**scheduling), make_core(**scheduling)
    heard: dict[str, list] = {}
    for each in asked:
        calm.add_request(each)
        reset.add_request(each)
    for _ in range(5):
        for output in reset.step()[0].outputs:
            heard.setdefault(output.request_id, []).append(output)
    assert reset.reset_prefix_cache() is False
    assert reset.reset_prefix_cache(running_too=True) is True
    assert reset.scheduler.kv_cache.pool.usage == 0
    for i, outputs in run(reset).items():
        heard.setdefault(i, []).extend(outputs)

    def tokens(heard: dict[str, list]) -> dict[str, list[int]]:
        return {i: [token for output in outputs for token in output.new_token_ids] for i, outputs in heard.items()}

    assert tokens(heard) == tokens(run(calm))


@pytest.mark.parametrize(("preload", "when"), [(True, "start"), (False, None), (None, "idle")])
def test_a_core_reads_the_vocabulary_when_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, preload: bool | None, when: str | None
):
    read, may_read = threading.Semaphore(0), threading.Event()

    def wait_and_read(self: LazyGrammars) -> None:
        assert may_read.wait(30)
        read.release()

    monkeypatch.setattr(LazyGrammars, "preload", wait_and_read)
    if when == "start":
        may_read.set()
    config = replace(
        make_config("tests.fakes:FakeExecutor", skip_tokenizer_init=False),
        structured_outputs=StructuredOutputsConfig(structured_outputs_config={"preload": preload}),
    )
    core = EngineCore(config, on_death=lambda cause: None, on_progress=lambda phase: None)
    assert read.acquire(blocking=False) == (when == "start")
    core.on_idle()  # returns at once
    may_read.set()
    core.on_idle()
    assert read.acquire(timeout=30 if when == "idle" else 0.1) == (when == "idle")
    assert not read.acquire(timeout=0.1)


def stepped(core: EngineCore, heard: dict[str, list], num_steps: int = 10_000) -> None:
    """So many steps, or until there is nothing to do."""
    for _ in range(num_steps):
        if not core.has_requests():
            return
        for message in core.step().values():
            for output in message.outputs:
                heard.setdefault(output.request_id, []).append(output)


@pytest.mark.parametrize("scheduling", [{}, {"async_scheduling": True}])
@pytest.mark.parametrize("clear_cache", [True, False])
def test_requests_that_a_pause_keeps_go_on_with_the_same_tokens(scheduling: dict, clear_cache: bool):
    asked = [request(f"r{i}", prompt=(i + 1, 2, 3) * 9, max_tokens=20, logprobs=1) for i in range(4)]
    calm, core = make_core(**scheduling), make_core(**scheduling)
    for each in asked:
        calm.add_request(each)
    expected = answers(run(calm))
    heard: dict[str, list] = {}
    for each in asked[:3]:
        core.add_request(each)
    stepped(core, heard, 5)
    core.pause("keep")
    assert core.is_paused()
    stepped(core, heard)  # what was in flight is told, and nothing else
    assert not core.is_coming_to_rest() and core.scheduler.kv_cache.pool.usage > 0
    if clear_cache:
        assert core.reset_prefix_cache(running_too=True) and core.scheduler.kv_cache.pool.usage == 0
    core.add_request(asked[3])
    assert not core.has_requests() and "r3" not in heard
    core.resume()
    stepped(core, heard)
    flat = {i: [t for o in outputs for t in o[0]] for i, outputs in answers(heard).items()}
    assert flat == {i: [t for o in outputs for t in o[0]] for i, outputs in expected.items()}
    assert all(ends(outputs) == [FinishReason.LENGTH] for outputs in heard.values())


def test_a_pause_that_waits_lets_requests_end_that_have_begun_and_holds_the_others():
    core = make_core(max_num_seqs=2)
    heard: dict[str, list] = {}
    for name in "abc":
        core.add_request(request(name, max_tokens=8))
    stepped(core, heard, 3)
    core.pause("wait")
    core.add_request(request("d", max_tokens=8))
    assert core.is_coming_to_rest()
    stepped(core, heard)
    assert not core.is_coming_to_rest() and sorted(heard) == ["a", "b"]
    assert all(ends(heard[name]) == [FinishReason.LENGTH] for name in "ab")
    core.abort_requests(["c"])
    stepped(core, heard)
    assert ends(heard["c"]) == [FinishReason.ABORT]
    core.resume()
    stepped(core, heard)
    assert ends(heard["d"]) == [FinishReason.LENGTH]


def test_a_pause_may_change_its_mind_and_what_one_held_another_aborts():
    core = make_core(max_num_seqs=1)
    heard: dict[str, list] = {}
    for name in "ab":
        core.add_request(request(name, max_tokens=30))
    stepped(core, heard, 3)
    core.pause("wait")
    core.pause("keep")
    stepped(core, heard)
    assert core.scheduler.requests.keys() == {"a", "b"}
    core.pause("abort")
    stepped(core, heard)
    assert [ends(heard[name]) for name in "ab"] == [[FinishReason.ABORT]] * 2
    core.resume()
    assert not core.is_paused()


@pytest.mark.parametrize("first", ["pause", "sleep"])
def test_requests_go_on_when_the_engine_is_neither_paused_nor_asleep(first: str):
    core = make_core()
    heard: dict[str, list] = {}
    core.add_request(request("a", max_tokens=8))
    stepped(core, heard, 3)
    told = len(heard["a"])
    begin = [lambda: core.pause("keep"), lambda: core.sleep(1, abort=False)]
    end = [core.resume, lambda: core.wake_up(SLEEPING_PARTS)]
    for act in begin if first == "pause" else reversed(begin):
        act()
    core.add_request(request("b", max_tokens=8))
    for act in end if first == "pause" else reversed(end):
        stepped(core, heard)
        assert len(heard["a"]) == told and "b" not in heard
        act()
    stepped(core, heard)
    assert [ends(heard[name]) for name in "ab"] == [[FinishReason.LENGTH]] * 2


def test_a_sleep_that_waits_keeps_its_hold_whatever_becomes_of_pauses():
    core = make_core(max_num_seqs=1)
    heard: dict[str, list] = {}
    for name in "ab":
        core.add_request(request(name, max_tokens=8))
    stepped(core, heard, 3)
    for holder in ("one", "two"):
        core.hold_for_sleep(holder)
    core.pause("wait")
    core.resume()
    core.end_hold("two")
    core.pause("wait")
    assert core.is_coming_to_rest()
    stepped(core, heard)
    assert not core.is_coming_to_rest() and ends(heard["a"]) == [FinishReason.LENGTH] and "b" not in heard
    core.sleep(1, abort=False)
    core.end_hold("one")
    assert core.wake_up(SLEEPING_PARTS) and core.is_paused()
    stepped(core, heard)
    assert "b" not in heard
    core.resume()
    stepped(core, heard)
    assert ends(heard["b"]) == [FinishReason.LENGTH]


STAND_STILL = {
    "sleeps": (lambda core: core.sleep(1, abort=False), lambda core: core.wake_up(SLEEPING_PARTS)),
    "is paused": (lambda core: core.pause("keep"), lambda core: core.resume()),
}


@pytest.mark.parametrize("state", STAND_STILL)
def test_nothing_waits_for_requests_that_stand_still(state: str):
    core = make_core()
    heard: dict[str, list] = {}
    core.add_request(request("a", max_tokens=8))
    stepped(core, heard, 3)
    stand_still, go_on = STAND_STILL[state]
    stand_still(core)
    refused = core.call_utility(UtilityRequest(1, "hold_for_sleep", ["x"]))
    assert f"the engine {state} amid requests" in refused.conflict and refused.failure is None
    if state == "sleeps":
        with pytest.raises(ConflictError, match="wake it up first"):
            core.pause("wait")
    go_on(core)
    stepped(core, heard)
    assert ends(heard["a"]) == [FinishReason.LENGTH]  # nothing that was refused holds anything
    core.add_request(request("b", max_tokens=8))
    stand_still(core)
    core.hold_for_sleep("x")  # what has not begun is not waited for
    core.pause("wait")
    stepped(core, heard)
    assert not core.is_coming_to_rest() and "b" not in heard


def test_nothing_stands_still_that_is_waited_for():
    core = make_core()
    heard: dict[str, list] = {}
    core.add_request(request("a", max_tokens=8))
    stepped(core, heard, 3)
    core.hold_for_sleep("x")
    with pytest.raises(ConflictError, match="a sleep waits"):
        core.pause("keep")
    assert not core.is_paused()
    core.end_hold("x")
    core.pause("wait")
    with pytest.raises(ConflictError, match="a pause or a sleep waits"):
        core.sleep(1, abort=False)
    assert not core.is_sleeping()
    core.sleep(1, abort=True)
    stepped(core, heard)
    assert ends(heard["a"]) == [FinishReason.ABORT] and not core.is_coming_to_rest()


def test_a_vocabulary_that_cannot_be_read_in_idle_time_is_tried_again_by_the_request_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
):
    tried, warned = [], threading.Event()

    def fail(config: Any) -> None:
        tried.append(1)
        raise OSError("no such file")

    monkeypatch.setattr("minivllm.engine.structured._load", fail)
    monkeypatch.setattr("minivllm.engine.structured.logger.warning", lambda *message: warned.set())
    grammars = LazyGrammars(make_config("tests.fakes:FakeExecutor", skip_tokenizer_init=False))
    grammars.preload_meanwhile()
    assert warned.wait(30) and tried == [1]
    with pytest.raises(OSError, match="no such file"):
        grammars.preload()
    assert tried == [1, 1]
