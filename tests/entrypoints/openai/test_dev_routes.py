"""The routes of operators: there when opened, true when asked, and an error where this engine cannot."""

from __future__ import annotations

import asyncio
import gzip
import json
import pstats
from pathlib import Path

import httpx
import pytest

from minivllm.config.model import ModelConfig
from minivllm.engine.arg_utils import AsyncEngineArgs
from minivllm.engine.async_llm import AsyncLLM
from minivllm.entrypoints.openai.tokenize.serving import ServingTokenize
from minivllm.exceptions import EngineError
from minivllm.sampling_params import SamplingParams
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import FakeEngine

DEV = [
    ("POST", "/reset_prefix_cache"), ("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping"),
    ("POST", "/pause"), ("POST", "/resume"), ("GET", "/is_paused"), ("POST", "/collective_rpc"),
    ("GET", "/server_info"), ("POST", "/abort_requests"), ("POST", "/start_profile"), ("POST", "/stop_profile"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), DEV)
def test_they_are_closed_unless_opened(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, method: str, path: str):
    assert Api(engine).request(method, path, json={}).status_code == 404
    assert Api(engine, enable_dev_endpoints=True, api_key=["k"]).request(method, path, json={}).status_code == 401
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    assert Api(engine, api_key=["k"]).request(method, path, json={}).status_code == 401
    assert path in {route.path for route in _routes(Api(engine).app.routes)}


def _routes(routes):
    for route in routes:
        inner = getattr(route, "original_router", None)
        yield from [route] if inner is None else _routes(inner.routes)


def test_a_way_to_pause_that_is_none_is_refused_by_name(engine: FakeEngine):
    response = Api(engine, enable_dev_endpoints=True).post("/pause?mode=freeze", None)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "query.mode")


@pytest.mark.parametrize("path", ["/start_profile", "/stop_profile"])
def test_profiling_routes_are_there_with_a_profiler_too(engine: FakeEngine, path: str):
    assert Api(engine).post(path, None).status_code == 404
    assert Api(engine, profiler_config={"torch_profiler_dir": "x"}).post(path, None).status_code in (400, 409)


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_adapters_are_refused_by_name_and_wrong_requests_for_what_is_wrong(api: Api, path: str):
    error = api.post(path, {"lora_name": "a", "lora_path": "b"}).json()["error"]
    assert (error["code"], error["param"]) == (400, "lora_name") and "no LoRA adapters" in error["message"]
    for wrong in ({"lora_path": "b"}, {"lora_name": "", "lora_path": "b"}, {"lora_name": 3, "lora_path": "b"}):
        error = api.post(path, wrong).json()["error"]
        assert (error["code"], error["param"]) == (400, "lora_name") and "validation" in error["message"]
    assert api.request("POST", path, content=b"{}").status_code == 400


def test_the_configuration_is_told_without_keys(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINIVLLM_API_KEY", "topsecret")
    api = Api(engine, enable_dev_endpoints=True, api_key=["alsosecret"])
    for form in ("text", "json"):
        answer = api.get(f"/server_info?config_format={form}", headers={"Authorization": "Bearer alsosecret"})
        assert answer.status_code == 200
        assert "secret" not in answer.text
        assert answer.json()["environment"]["MINIVLLM_API_KEY"] == "(set)"
    assert answer.json()["config"]["engine"]["model"]["model"] == "fake"


def test_invocations_takes_every_kind(api: Api):
    assert api.post("/invocations", {"prompt": "Hi"}).json()["object"] == "text_completion"
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert api.post("/invocations", chat).json()["object"] == "chat.completion"
    assert "[DONE]" in api.post("/invocations", {**chat, "stream": True}).text
    assert api.post("/invocations", {}).status_code == 400
    error = api.post("/invocations", {"prompt": "Hi", "n": "x"}).json()["error"]
    assert (error["code"], error["param"]) == (400, "n")


def test_a_batch_has_a_choice_for_each_conversation(api: Api):
    conversations = [[{"role": "user", "content": text}] for text in ("a", "bb")]
    body = api.post("/v1/chat/completions/batch", {"messages": conversations, "temperature": 0.5}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    alone = [api.chat(messages=messages) for messages in conversations]
    assert [c["message"] for c in body["choices"]] == [one["choices"][0]["message"] for one in alone]
    assert body["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
    assert {call.params.temperature for call in api.engine.calls[:2]} == {0.5}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stream": True}, "stream"), ({"n": 2}, "n"), ({"tools": [{}]}, "tools"), ({"messages": []}, "messages"),
        ({"messages": [[]]}, "messages"), ({"temperature": "hot"}, "temperature"), ({"max_tokens": 9999}, "max_tokens"),
    ],
)  # fmt: skip
def test_a_wrong_batch_is_refused(api: Api, change: dict, param: str):
    body = {"messages": [[{"role": "user", "content": "x"}]], **change}
    error = api.post("/v1/chat/completions/batch", body).json()["error"]
    assert (error["code"], error["param"]) == (400, param)
    assert api.engine.num_open == 0


def test_of_a_batch_the_wrong_conversation_is_named(api: Api):
    messages = [[{"role": "user", "content": "x"}], [{"role": "clown", "content": "x"}]]
    error = api.post("/v1/chat/completions/batch", {"messages": messages}).json()["error"]
    assert error["param"] == "messages[1][0].role" and error["message"].startswith("messages[1][0].role is")


def test_the_tokenizers_configuration_is_told_when_opened(engine: FakeEngine, tmp_path: Path):
    assert Api(engine).get("/tokenizer_info").status_code == 404
    info = Api(engine, enable_tokenizer_info_endpoint=True).get("/tokenizer_info").json()
    assert info == {"chat_template": "bytes", "vocab_size": engine.tokenizer.vocab_size}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "X"}))
    serving: ServingTokenize = Api(engine).app.state.serving_tokenize
    assert serving.info(ModelConfig(model=str(tmp_path)))["tokenizer_class"] == "X"


@pytest.fixture
def llm(tiny_model: Path):
    yield from started(tiny_model, max_model_len=2048)


@pytest.fixture
def sleeper(tiny_model: Path, tmp_path: Path):
    profiler = {"torch_profiler_dir": str(tmp_path / "p")}
    yield from started(tiny_model, max_model_len=1024, enable_sleep_mode=True, profiler_config=profiler)


def started(model: Path, *, max_model_len: int = 256, **options):
    arguments = AsyncEngineArgs(str(model), max_model_len=max_model_len, kv_cache_memory_bytes=16 << 20, **options)
    engine = AsyncLLM.from_engine_args(arguments)
    yield engine
    engine.shutdown()


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def until_it_runs(llm: AsyncLLM, task: asyncio.Future) -> None:
    """Or is done. What has not begun yet is held by a pause, not waited for."""
    while not task.done() and not (await llm.snapshots())[0].num_running_reqs:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_a_sleeping_server_holds_requests_until_it_wakes(sleeper: AsyncLLM, mode: str):
    api = Api(sleeper, enable_dev_endpoints=True)
    ask = {"prompt": [1, 2, 3], "max_tokens": 1000, "ignore_eos": True, "temperature": 0, "return_token_ids": True}

    async def talk(client: httpx.AsyncClient) -> None:
        async def complete() -> dict:
            return (await client.post("/v1/completions", json=ask)).json()["choices"][0]

        calm = await complete()
        num_open = 1 if mode == "wait" else 16  # one alone may end before it is put to sleep
        open_ones = [asyncio.ensure_future(complete()) for _ in range(num_open)]
        await until_it_runs(sleeper, open_ones[0])
        slept = (await client.post(f"/sleep?level=2&mode={mode}")).json()
        assert slept == {"status": "sleeping", "level": 2}
        if mode != "keep":
            reasons = {(await each)["finish_reason"] for each in open_ones}
            assert "abort" in reasons if mode == "abort" else reasons == {"length"}
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": True}
        waiting = asyncio.ensure_future(complete())
        await asyncio.sleep(0.1)
        assert not waiting.done() and (await client.get("/health")).status_code == 200
        half = (await client.post("/wake_up?tags=weights")).json()
        assert half == {"status": "sleeping", "tags": ["weights"]}
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert (await client.post("/wake_up")).json() == {"status": "awake", "tags": None}
        assert await waiting == calm
        if mode == "keep":
            assert all([await each == calm for each in open_ones])
        for wrong, param in (("/sleep?level=3", "level"), ("/wake_up?tags=legs", "tags"), ("/sleep?mode=x", "mode")):
            response = await client.post(wrong)
            assert response.status_code == 400 and param in response.json()["error"]["param"]

    api.run(talk)


def test_a_sleep_in_a_pause_is_a_409_where_it_would_wait_for_what_the_pause_keeps(sleeper: AsyncLLM):
    api = Api(sleeper, enable_dev_endpoints=True)
    ask = {"prompt": [1, 2, 3], "max_tokens": 1000, "ignore_eos": True, "temperature": 0, "return_token_ids": True}

    async def talk(client: httpx.AsyncClient) -> None:
        async def complete() -> dict:
            return (await client.post("/v1/completions", json=ask)).json()["choices"][0]

        calm = await complete()
        open_ones = [asyncio.ensure_future(complete()) for _ in range(16)]
        await until_it_runs(sleeper, open_ones[0])
        await client.post("/pause?mode=keep")
        refused = await client.post("/sleep?mode=wait")
        assert (refused.status_code, refused.json()["error"]["type"]) == (409, "ConflictError")
        assert (await client.post("/sleep?level=2&mode=keep")).status_code == 200
        refused = await client.post("/pause?mode=wait")
        assert refused.status_code == 409 and "wake it up" in refused.json()["error"]["message"]
        await client.post("/resume")
        await asyncio.sleep(0.1)
        assert not all(each.done() for each in open_ones)
        await client.post("/wake_up")
        assert all([await each == calm for each in open_ones])
        for path in ("/is_paused", "/is_sleeping"):
            assert list((await client.get(path)).json().values()) == [False]

    api.run(talk)


def test_the_prefix_cache_is_reset_under_running_requests_when_asked_to(sleeper: AsyncLLM):
    api = Api(sleeper, enable_dev_endpoints=True)
    ask = {"prompt": [1, 2, 3], "max_tokens": 1000, "ignore_eos": True, "temperature": 0, "return_token_ids": True}

    async def talk(client: httpx.AsyncClient) -> None:
        calm = (await client.post("/v1/completions", json=ask)).json()["choices"]
        running = asyncio.ensure_future(client.post("/v1/completions", json=ask))
        await until_it_runs(sleeper, running)
        done = await client.post("/reset_prefix_cache?reset_running_requests=true")
        assert done.json() == {"success": True}
        assert (await running).json()["choices"] == calm

    api.run(talk)


def test_without_sleep_mode_nothing_sleeps(llm: AsyncLLM):
    api = Api(llm, enable_dev_endpoints=True)

    async def talk(client: httpx.AsyncClient) -> None:
        response = await client.post("/sleep")
        assert response.status_code == 400 and "--enable-sleep-mode" in response.json()["error"]["message"]
        assert "--profiler-config" in (await client.post("/start_profile")).json()["error"]["message"]

    api.run(talk)


def test_a_profile_is_files_of_the_worker_and_of_the_server(sleeper: AsyncLLM, tmp_path: Path):
    api = Api(sleeper, enable_dev_endpoints=True)

    async def talk(client: httpx.AsyncClient) -> list[str]:
        assert (await client.post("/stop_profile")).status_code == 409
        for wrong in ({"profile_prefix": "../x"}, {"max_iterations": -1}):
            assert (await client.post("/start_profile", json=wrong)).status_code == 400
        assert (await client.post("/start_profile", json={"profile_prefix": "mine"})).status_code == 200
        busy = await client.post("/start_profile")
        assert (busy.status_code, busy.json()["error"]["type"]) == (409, "ConflictError")
        await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 5, "ignore_eos": True})
        return (await client.post("/stop_profile")).json()["files"]

    trace, table, stats, functions = map(Path, api.run(talk))
    assert {path.parent for path in (trace, table, stats, functions)} == {tmp_path / "p"}
    assert all(path.name.startswith("mine_") for path in (trace, table, stats, functions))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum("execute_model" in event["name"] for event in events) >= 5
    assert "Self CPU" in table.read_text()
    names = {function for _, _, function in pstats.Stats(str(stats)).stats}
    assert "process_outputs" in names
    assert "Ordered by: internal time" in functions.read_text()  # of the slowest, which are not always the same


def test_a_paused_engine_begins_with_nothing_until_it_is_resumed(llm: AsyncLLM):
    async def answer(request_id: str, max_tokens: int) -> tuple[str, list[int]]:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=7)
        async for output in llm.generate({"prompt_token_ids": [1, 2]}, params, request_id):
            last = output
            told[request_id] = len(last.outputs[0].token_ids)
        return last.outputs[0].finish_reason, list(last.outputs[0].token_ids)

    told: dict[str, int] = {}  # tokens, by request

    async def begun(request_id: str) -> asyncio.Task:
        task = asyncio.ensure_future(answer(request_id, 2000))
        await until(lambda: told.get(request_id, 0) > 3)
        return task

    async def caught(name: str, *pause) -> asyncio.Task:
        """A request that the pause found running: on a busy machine some have ended before it comes."""
        for attempt in range(20):
            task = await begun(f"{name}-{attempt}")
            await llm.pause_generation(*pause)
            await asyncio.sleep(0.05)  # what was on its way arrives
            if not task.done() or (await task)[0] == "abort":
                return task
            await llm.resume_generation()
        raise AssertionError(f"20 requests ended, none was {pause[0]}ed")

    async def main() -> None:
        calm = (await answer("calm", 2000))[1]
        assert (await (await caught("a", "abort")))[0] == "abort"
        waiting = asyncio.ensure_future(answer("b-0", 3))
        await asyncio.sleep(0.05)
        assert await llm.is_paused() and not waiting.done()
        await llm.resume_generation()
        assert (await waiting)[0] == "length"

        running = await begun("c-0")
        await llm.pause_generation("wait")
        assert (await running)[0] == "length"
        await llm.resume_generation()

        for clear_cache in (True, False):
            kept = await caught(f"d-{clear_cache}", "keep", clear_cache)
            waiting = asyncio.ensure_future(answer(f"e-{clear_cache}", 3))
            had = dict(told)
            await asyncio.sleep(0.05)
            assert told == had and not kept.done() and not waiting.done()
            assert ((await llm.snapshots())[0].kv_cache_usage == 0) is clear_cache
            await llm.resume_generation()
            assert await kept == ("length", calm)
            assert (await waiting)[0] == "length"

        three = await asyncio.gather(*(begun(name) for name in ("f-0", "f-1", "g")))
        assert await llm.abort_matching(["f", "nobody"]) == 2
        assert await llm.abort_matching([]) == 1
        assert [(await task)[0] for task in three] == ["abort"] * 3
        with pytest.raises(EngineError, match="no_such_method"):
            await llm.collective_rpc("no_such_method")

    asyncio.run(main())


def test_routes_reach_the_engine(llm: AsyncLLM):
    api = Api(llm, enable_dev_endpoints=True)  # the real engine behind the app

    async def talk(client: httpx.AsyncClient) -> None:
        assert (await client.post("/pause?mode=wait")).json() == {"status": "paused"}
        assert (await client.get("/is_paused")).json() == {"is_paused": True}
        assert (await client.post("/resume")).json() == {"status": "resumed"}
        assert (await client.post("/reset_prefix_cache")).json() == {"success": True}
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": False}
        assert (await client.post("/abort_requests", json={})).json() == {"status": "aborted", "aborted": 0}
        for method in ("_x", "", "no_such_method"):
            wrong = await client.post("/collective_rpc", json={"method": method})
            assert wrong.status_code == 400

    api.run(talk)
