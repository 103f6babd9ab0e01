"""The routes of operators: there when opened, true when asked, and an error where this engine cannot."""

from __future__ import annotations

import asyncio
import json
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


@pytest.mark.parametrize("path", ["/sleep", "/wake_up", "/start_profile", "/stop_profile", "/pause?mode=keep"])
def test_what_cannot_be_done_is_an_error_that_says_so(engine: FakeEngine, path: str):
    response = Api(engine, enable_dev_endpoints=True).post(path, None)
    assert (response.status_code, response.json()["error"]["type"]) == (501, "NotImplementedError")


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_adapters_are_refused(api: Api, path: str):
    assert api.post(path, {"lora_name": "a", "lora_path": "b"}).status_code == 501


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
    arguments = AsyncEngineArgs(str(tiny_model), max_model_len=256, kv_cache_memory_bytes=16 << 20)
    engine = AsyncLLM.from_engine_args(arguments)
    yield engine
    engine.shutdown()


def test_a_paused_engine_takes_no_work_until_it_is_resumed(llm: AsyncLLM):
    async def answer(request_id: str, max_tokens: int) -> str:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        async for output in llm.generate({"prompt_token_ids": [1, 2]}, params, request_id):
            last = output
        return last.outputs[0].finish_reason

    async def main() -> None:
        open_one = asyncio.ensure_future(answer("a-0", 100))
        while not llm.output_processor.has_unfinished_requests():
            await asyncio.sleep(0.001)
        await llm.pause(abort=True)
        assert await open_one == "abort"
        waiting = asyncio.ensure_future(answer("b-0", 3))
        await asyncio.sleep(0.05)
        assert llm.is_paused and not waiting.done() and not llm.output_processor.has_unfinished_requests()
        llm.resume()
        assert await waiting == "length"
        running = asyncio.ensure_future(answer("c-0", 20))
        await asyncio.sleep(0)
        while not llm.output_processor.has_unfinished_requests():
            await asyncio.sleep(0.001)
        await llm.pause(abort=False)
        assert await running == "length"
        llm.resume()
        both = [asyncio.ensure_future(answer(name, 100)) for name in ("d-0", "d-1", "e")]
        while llm.output_processor.num_unfinished_requests < 3:
            await asyncio.sleep(0.001)
        assert await llm.abort_matching(["d", "nobody"]) == 2
        assert await llm.abort_matching([]) == 1
        assert [await task for task in both] == ["abort"] * 3
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
