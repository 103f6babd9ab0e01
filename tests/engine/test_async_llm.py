"""AsyncLLM over real sockets to a real process, with a fake model in it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from dataclasses import replace

import msgspec
import psutil
import pytest

from minivllm.config.scheduler import SchedulerConfig
from minivllm.engine.async_llm import AsyncLLM
from minivllm.engine.core_client import SyncMPClient
from minivllm.engine.front import submit
from minivllm.engine.output_processor import RequestOutputCollector
from minivllm.exceptions import (
    EngineDeadError,
    EngineGenerateError,
    EngineStartError,
    QueueFullError,
    RequestError,
)
from minivllm.messages.codec import encode
from minivllm.messages.engine import EngineCoreRequest, FinishReason, RequestType
from minivllm.messages.stats import BLOCK_EMPTY, BLOCK_HELD
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from tests.engine.engines import POISON, make_config

ENDLESS = {"max_tokens": 100_000, "ignore_eos": True, "output_kind": RequestOutputKind.DELTA}
LONG = 50_000  # tokens of context: a stream that is still open when something happens to it

pytestmark = pytest.mark.usefixtures("run_dir")


def run(
    scenario,
    executor: str = "tests.fakes:FakeExecutor",
    *,
    max_model_len: int = 256,
    stat_loggers=(),
    scheduler: SchedulerConfig | None = None,
) -> None:
    """Run `scenario(engine)` on a fresh loop with a fresh engine; both are gone afterwards."""
    config = replace(make_config(executor, max_model_len=max_model_len), scheduler=scheduler or SchedulerConfig())
    engine = AsyncLLM.from_engine_config(config, stat_loggers=stat_loggers)
    try:
        asyncio.run(asyncio.wait_for(scenario(engine), 60))
    finally:
        engine.shutdown()
    assert not psutil.pid_exists(engine.engine_core.core_pid)


async def collect(engine, prompt=(1, 2, 3), request_id: str = "a", **params) -> tuple[list[int], str]:
    """All tokens of a DELTA request and why it ended."""
    tokens: list[int] = []
    async for output in engine.generate(list(prompt), SamplingParams(**{**ENDLESS, **params}), request_id):
        tokens += output.outputs[0].token_ids
    assert output.finished
    return tokens, output.outputs[0].finish_reason


def test_many_at_once_equal_each_alone():
    async def scenario(engine):
        prompts = [[1 + i % 9, 2, i % 64] for i in range(40)]
        asked = [collect(engine, p, f"r{i}", max_tokens=1 + i, seed=i) for i, p in enumerate(prompts)]
        together = await asyncio.gather(*asked)
        assert [len(tokens) for tokens, _ in together] == [1 + i for i in range(40)]
        for i in (0, 7, 39):
            assert await collect(engine, prompts[i], "alone", max_tokens=1 + i, seed=i) == together[i]

    run(scenario)


def test_equal_ids_are_two_requests():
    async def scenario(engine):
        first, second = await asyncio.gather(*(collect(engine, max_tokens=9, seed=1) for _ in range(2)))
        assert first == second and len(first[0]) == 9

    run(scenario)


def test_n_answers_differ_and_repeat_with_the_seed():
    async def scenario(engine):
        params = SamplingParams(
            n=3, seed=5, max_tokens=8, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        twice = []
        for _ in range(2):
            [output] = [output async for output in engine.generate([1, 2], params, "n")]
            assert output.finished and [answer.index for answer in output.outputs] == [0, 1, 2]
            twice.append([answer.token_ids for answer in output.outputs])
        assert twice[0] == twice[1] and len({tuple(tokens) for tokens in twice[0]}) == 3

    run(scenario)


def test_closing_the_generator_aborts_exactly_once():
    async def scenario(engine):
        sent: list[list[str]] = []
        abort = engine.engine_core.abort_requests
        engine.engine_core.abort_requests = lambda ids: (sent.append(ids) if ids else None, abort(ids))
        stream = engine.generate([1], SamplingParams(**ENDLESS), "a")
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(collect(engine, request_id="b"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [[id.rpartition("-")[0] for id in ids] for ids in sent] == [["a"], ["b"]]
        assert engine.output_processor.num_unfinished_requests == 0
        assert await reset_succeeds(engine)

    run(scenario, max_model_len=LONG)


async def reset_succeeds(engine) -> bool:
    """Whether the core soon holds no block: its cache can be reset only then."""
    for _ in range(100):
        if await engine.reset_prefix_cache():
            return True
        await asyncio.sleep(0.02)
    return False


def test_an_abort_by_id_ends_the_stream_with_that_reason():
    async def scenario(engine):
        task = asyncio.create_task(collect(engine))
        await asyncio.sleep(0.05)
        await engine.abort("a")
        assert (await task)[1] == "abort"
        assert await reset_succeeds(engine)

    run(scenario, max_model_len=LONG)


def test_a_request_at_fault_is_refused_before_the_engine_sees_it():
    async def scenario(engine):
        with pytest.raises(RequestError, match="vocabulary"):
            await collect(engine, [10_000])
        assert len((await collect(engine, max_tokens=3))[0]) == 3

    run(scenario)


def test_a_request_that_fails_in_the_engine_leaves_the_others_alone():
    async def scenario(engine):
        good, bad = await asyncio.gather(
            collect(engine, max_tokens=20), collect(engine, [POISON], "b"), return_exceptions=True
        )
        assert isinstance(bad, EngineGenerateError) and "non-finite" in str(bad)
        assert len(good[0]) == 20

    run(scenario, "tests.engine.engines:FailingRowExecutor")


def test_an_undecodable_request_is_answered_with_an_error():
    async def scenario(engine):
        send = engine.engine_core.add_request
        core = engine.engine_core._core
        engine.engine_core.add_request = lambda request: core.send(
            RequestType.ADD, encode([request.request_id, "no list", 3, "no seed"])
        )
        with pytest.raises(EngineGenerateError, match="cannot be decoded"):
            await collect(engine)
        engine.engine_core.add_request = send
        assert len((await collect(engine, max_tokens=3))[0]) == 3

    run(scenario)


def count_messages(engine) -> list[tuple[RequestType, int]]:
    """The list that what is sent to the core from now on is added to: its kind, and of how much it is."""
    sent: list[tuple[RequestType, int]] = []
    core = engine.engine_core._core
    send = core.send

    def counted(kind: RequestType, *payloads: bytes) -> None:
        sent.append((kind, len(payloads)))
        send(kind, *payloads)

    core.send = counted
    return sent


def test_requests_that_come_together_are_one_message():
    async def scenario(engine):
        sent = count_messages(engine)
        answers = await asyncio.gather(*(collect(engine, [1], f"r{i}", max_tokens=i + 1) for i in range(5)))
        assert [len(tokens) for tokens, *_ in answers] == [1, 2, 3, 4, 5]
        assert sent == [(RequestType.ADD, 5)]

    run(scenario)


def test_an_undecodable_request_leaves_those_it_came_with_alone():
    async def scenario(engine):
        sent = count_messages(engine)
        send = engine.engine_core._send_request

        def spoil(request: bytes) -> None:
            request_id = msgspec.msgpack.decode(request)[0]
            send(encode([request_id, "no list", 3, "no seed"]) if request_id.startswith("bad") else request)

        engine.engine_core._send_request = spoil
        asked = [collect(engine, [1], name, max_tokens=3) for name in ("one", "bad", "two")]
        one, bad, two = await asyncio.gather(*asked, return_exceptions=True)
        assert len(one[0]) == len(two[0]) == 3
        assert isinstance(bad, EngineGenerateError) and "cannot be decoded" in str(bad)
        assert sent == [(RequestType.ADD, 3)]

    run(scenario)


def test_an_abort_never_overtakes_its_request():
    async def scenario(engine):
        sent = count_messages(engine)
        asking = asyncio.ensure_future(collect(engine, [1], "r", **ENDLESS))
        while not engine.output_processor.has_unfinished_requests():
            await asyncio.sleep(0)
        await engine.abort("r")
        await asking
        assert [kind for kind, _ in sent] == [RequestType.ADD, RequestType.ABORT]

    run(scenario)


def test_a_slow_consumer_gets_every_token():
    async def scenario(engine):
        tokens: list[int] = []
        num_outputs = 0
        async for output in engine.generate([1], SamplingParams(**{**ENDLESS, "max_tokens": 200}), "slow"):
            tokens += output.outputs[0].token_ids
            num_outputs += 1
            await asyncio.sleep(0.02)
        assert len(tokens) == 200 > num_outputs

    run(scenario)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_the_death_of_the_core_is_told_to_everyone_by_its_signal(how):
    async def scenario(engine):
        tasks = [asyncio.create_task(collect(engine, request_id=f"r{i}")) for i in range(5)]
        await asyncio.sleep(0.1)
        os.kill(engine.engine_core.core_pid, how)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        assert {type(result) for result in results} == {EngineDeadError}
        assert how.name in str(results[0]) and how.name in str(await engine.wait_dead())
        assert engine.errored and not engine.is_running
        for call in (engine.check_health, engine.reset_prefix_cache, lambda: collect(engine)):
            with pytest.raises(EngineDeadError):
                await call()

    run(scenario, max_model_len=LONG)


def test_a_stream_cut_by_the_cores_death_goes_on_in_another_engine():
    params = SamplingParams(**{**ENDLESS, "max_tokens": 1_500}, logprobs=0)
    before, whole, after = [], [], []
    requests = []

    def rows(output) -> list[tuple]:
        answer = output.outputs[0]
        return [(token, row[token].logprob) for token, row in zip(answer.token_ids, answer.logprobs)]

    async def dies(engine):
        request, _ = engine.processor.process_inputs("a", [1, 2, 3], params)
        requests.append(request)
        with pytest.raises(EngineDeadError):
            async for output in engine.generate(request, request.sampling_params, "a"):
                before.extend(rows(output))
                if not engine.errored:
                    os.kill(engine.engine_core.core_pid, signal.SIGKILL)

    async def goes_on(engine):
        prior = [token for token, _ in before]
        resent = msgspec.structs.replace(requests[0], prior_output_token_ids=prior)
        async for output in engine.generate(resent, resent.sampling_params, "a"):
            after.extend(rows(output))
        assert output.outputs[0].finish_reason == "length"
        again = msgspec.structs.replace(requests[0], request_id="again")
        async for output in engine.generate(again, again.sampling_params, "b"):
            whole.extend(rows(output))

    run(dies, max_model_len=LONG)
    run(goes_on, max_model_len=LONG)
    assert 0 < len(before) < 1_500
    assert before + after == whole


def test_the_death_of_an_idle_core_is_known_without_a_request():
    async def scenario(engine):
        await engine.check_health()
        os.kill(engine.engine_core.core_pid, signal.SIGKILL)
        assert "SIGKILL" in str(await engine.wait_dead())

    run(scenario)


def test_a_core_that_is_terminated_says_so():
    async def scenario(engine):
        task = asyncio.create_task(collect(engine))
        await asyncio.sleep(0.1)
        os.kill(engine.engine_core.core_pid, signal.SIGTERM)
        with pytest.raises(EngineDeadError, match="SIGTERM"):
            await task

    run(scenario, max_model_len=LONG)


@pytest.mark.parametrize(
    ("executor", "cause"),
    [
        ("tests.engine.engines:PoisonedExecutor", "ValueError: the model met its poison"),
        ("tests.engine.engines:DyingWorkerExecutor", "worker 0 was killed by SIGKILL"),
        ("tests.engine.engines:UnencodableExecutor", "the engine core failed: TypeError"),
    ],
)
def test_a_failure_in_a_step_gives_its_cause(executor, cause):
    async def scenario(engine):
        with pytest.raises(EngineDeadError, match=cause):
            await collect(engine, [POISON], max_tokens=50)

    run(scenario, executor)


def test_an_undecodable_message_that_is_no_request_ends_the_core_with_the_cause():
    async def scenario(engine):
        task = asyncio.create_task(collect(engine, [1], max_tokens=10_000))
        await asyncio.sleep(0.1)
        engine.engine_core._core.send(RequestType.ABORT, b"\xc1")
        with pytest.raises(EngineDeadError, match="the inputs thread of the engine core failed"):
            await task

    run(scenario, max_model_len=LONG)


def test_a_request_whose_parameters_the_core_refuses_fails_alone():
    async def scenario(engine):
        request, _ = engine.processor.process_inputs("bad", [1], SamplingParams())
        request.sampling_params.top_p = 7.0  # as if the front end's check had a hole
        collector = RequestOutputCollector(RequestOutputKind.FINAL_ONLY)
        engine._start_reading()
        front = (engine.engine_core, engine.output_processor)
        submit(request, *front, external_id="bad", prompt=None, collector=collector)
        with pytest.raises(EngineGenerateError, match="top_p"):
            await collector.get()
        assert len(await collect(engine, [1], max_tokens=3)) == 2

    run(scenario)


def test_a_request_that_cannot_be_sent_leaves_nothing_expected():
    async def scenario(engine):
        request, _ = engine.processor.process_inputs("bad", [1], SamplingParams(n=2, temperature=1.0))
        request.cache_salt = "\ud800"
        with pytest.raises(UnicodeEncodeError):
            submit(request, engine.engine_core, engine.output_processor, external_id="bad", prompt=None)
        assert not engine.output_processor.has_unfinished_requests()

    run(scenario)


@pytest.mark.parametrize("in_loop", [True, False])
def test_shutdown_ends_open_requests_as_aborted(in_loop):
    async def scenario(engine):
        tasks = [asyncio.create_task(collect(engine, request_id=f"r{i}")) for i in range(3)]
        await asyncio.sleep(0.1)
        engine.shutdown() if in_loop else await asyncio.to_thread(engine.shutdown)
        assert {reason for _, reason in await asyncio.gather(*tasks)} == {"abort"}
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(engine)

    run(scenario, max_model_len=LONG)


def test_a_shutdown_with_time_lets_requests_finish():
    async def scenario(engine):
        tasks = [asyncio.create_task(collect(engine, request_id=f"r{i}", max_tokens=200)) for i in range(3)]
        await asyncio.sleep(0.01)
        await asyncio.to_thread(engine.shutdown, 30)
        assert {(len(tokens), reason) for tokens, reason in await asyncio.gather(*tasks)} == {(200, "length")}

    run(scenario)


def test_a_core_that_ends_answers_what_is_open():
    client = SyncMPClient(make_config(max_model_len=LONG))
    client.wait_ready()
    client.add_request(EngineCoreRequest("a", [1], SamplingParams(max_tokens=None, ignore_eos=True), seed=1))
    client.get_output()
    client._core.stop()
    reasons = [client.get_output().outputs[-1].finish_reason]
    while reasons[-1] is None:
        reasons.append(client.get_output().outputs[-1].finish_reason)
    assert reasons[-1] is FinishReason.ABORT
    client.shutdown()


def test_the_engine_may_be_built_in_a_thread_that_ends():
    built: list[AsyncLLM] = []
    thread = threading.Thread(target=lambda: built.append(AsyncLLM.from_engine_config(make_config())))
    thread.start()
    thread.join()
    try:
        assert len(asyncio.run(collect(built[0], max_tokens=5))[0]) == 5
        assert (
            len(asyncio.run(collect(built[0], max_tokens=5))[0]) == 5
        )  # and used by one loop after the other
    finally:
        built[0].shutdown()


def test_stat_loggers_hear_of_every_step():
    class Counter:
        tokens, ended, running = 0, 0, []

        def record(self, scheduler_stats, iteration):
            self.tokens += iteration.num_generation_tokens
            self.ended += len(iteration.finished_requests)
            self.running.append(scheduler_stats.num_running_reqs)

    counter = Counter()

    async def scenario(engine):
        await asyncio.gather(*(collect(engine, request_id=f"r{i}", max_tokens=5) for i in range(3)))
        while counter.running[-1]:
            await asyncio.sleep(0.01)
        assert (counter.tokens, counter.ended) == (15, 3)

    run(scenario, stat_loggers=[counter])


@pytest.mark.parametrize(
    ("executor", "message", "exit_code"),
    [
        ("tests.engine.engines:BrokenModelExecutor", "model.norm.weight has shape [63]", 3),
        ("tests.engine.engines:CrashingStartExecutor", "killed by SIGKILL", 1),
        ("nothing", "is no executor", 2),
    ],
)
def test_a_start_that_fails_gives_one_line_and_an_exit_code(executor, message, exit_code):
    with pytest.raises(EngineStartError) as failed:
        AsyncLLM.from_engine_config(make_config(executor))
    assert message in str(failed.value) and "\n" not in str(failed.value)
    assert failed.value.exit_code == exit_code


def test_a_crash_while_starting_names_the_phase():
    with pytest.raises(EngineStartError, match="loading weights"):
        AsyncLLM.from_engine_config(make_config("tests.engine.engines:CrashingStartExecutor"))


def test_no_more_requests_are_admitted_than_may_be_queued():
    class Rejections:
        def __init__(self):
            self.by = []

        def record(self, scheduler_stats, iteration):
            self.by += iteration.rejected_by

    rejections = Rejections()

    async def scenario(engine):
        engine.check_admission(3)
        with pytest.raises(QueueFullError, match="--max-num-queued-reqs allows 3"):
            engine.check_admission(4)
        stream = engine.generate([1, 2], SamplingParams(**ENDLESS, n=2), "a")
        await anext(stream)
        engine.check_admission(1)
        with pytest.raises(QueueFullError, match="2 requests are open") as refused:
            engine.check_admission(2)
        assert refused.value.reason == "max_num_queued_reqs"
        await stream.aclose()
        engine.check_admission(3)
        await collect(engine, max_tokens=3)
        assert rejections.by == ["max_num_queued_reqs"] * 2

    scheduler = SchedulerConfig(max_num_queued_reqs=3)
    run(scenario, max_model_len=LONG, scheduler=scheduler, stat_loggers=[rejections])


def test_nothing_is_admitted_while_too_many_prompt_tokens_wait():
    async def scenario(engine):
        engine.check_admission()
        stream = engine.generate([1] * 60, SamplingParams(**ENDLESS), "a")
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)  # it is sent, and no answer can have come
        with pytest.raises(QueueFullError, match="60 prompt tokens wait and --max-num-queued-tokens is 50"):
            engine.check_admission()
        await first
        engine.check_admission()
        await stream.aclose()

    run(scenario, scheduler=SchedulerConfig(max_num_queued_tokens=50))


def test_under_the_priority_policy_the_more_important_request_is_answered_first():
    async def scenario(engine):
        order = []

        async def ask(name, priority):
            params = SamplingParams(max_tokens=5, ignore_eos=True)
            async for _ in engine.generate([1, 2, 3], params, name, priority=priority):
                pass
            order.append(name)

        stream = engine.generate([1], SamplingParams(**ENDLESS), "holds the only place")
        await anext(stream)
        asked = [asyncio.ensure_future(ask(f"r{priority}", priority)) for priority in (2, 0, 1, -1)]
        await asyncio.sleep(0)  # all are sent, in this order, before the place is free
        await stream.aclose()
        await asyncio.gather(*asked)
        assert order == ["r-1", "r0", "r1", "r2"]

    scheduler = SchedulerConfig(scheduling_policy="priority", max_num_active_seqs=1)
    run(scenario, max_model_len=LONG, scheduler=scheduler)


def test_a_snapshot_can_be_asked_for_in_mid_stream_and_when_nothing_runs():
    async def scenario(engine):
        (idle,) = await engine.snapshots()
        assert (idle.num_running_reqs, idle.num_generation_tokens) == (0, 0)
        assert len(idle.blocks) == -(-idle.num_blocks // idle.block_stride)
        assert set(idle.blocks) == {BLOCK_EMPTY}
        stream = engine.generate([1, 2, 3], SamplingParams(**ENDLESS), "a")
        await anext(stream)
        (busy,) = await engine.snapshots()
        assert (busy.num_running_reqs, busy.num_prompt_tokens) == (1, 3)
        assert busy.num_generation_tokens >= 1 and BLOCK_HELD in busy.blocks
        await stream.aclose()

    run(scenario, max_model_len=LONG)


def test_what_constraints_need_is_started_once_nobody_wants_anything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minivllm.engine.async_llm._QUIET_LOOK_S", 0.01)
    open_when_prepared = []

    async def scenario(engine):
        prepared, loop = asyncio.Event(), asyncio.get_running_loop()

        def prepare() -> None:
            open_when_prepared.append(engine.output_processor.has_unfinished_requests())
            loop.call_soon_threadsafe(prepared.set)

        engine.processor.prepare = prepare
        await collect(engine, max_tokens=200)
        await prepared.wait()
        await collect(engine, max_tokens=5)
        await asyncio.sleep(0.2)

    run(scenario)
    assert open_when_prepared == [False]


def test_who_gives_up_waiting_for_sleep_leaves_nothing_paused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minivllm.engine.async_llm.check_sleep", lambda config, level: None)

    async def scenario(engine):
        stream = engine.generate([1, 2, 3], SamplingParams(**ENDLESS), "open")
        await anext(stream)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.sleep(mode="wait"), 0.2)
        assert not await engine.is_paused()
        assert (await collect(engine, request_id="next", max_tokens=3))[1] == "length"
        await stream.aclose()

    run(scenario, max_model_len=LONG)
