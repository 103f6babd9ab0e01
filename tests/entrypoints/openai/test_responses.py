"""POST /v1/responses: items and events, and conversations that go on; OpenAI's own client reads them."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from minivllm.entrypoints.openai.chat_completion.job import AnswerDelta
from minivllm.entrypoints.openai.protocol import Usage
from minivllm.entrypoints.openai.responses.convert import _tool, _tool_choice, input_messages
from minivllm.entrypoints.openai.responses.protocol import ResponsesRequest
from minivllm.entrypoints.openai.responses.serving import _begin, _Maker
from minivllm.entrypoints.openai.responses.store import ResponseStore
from minivllm.exceptions import EngineGenerateError, NotFoundError
from minivllm.tool_parsers.pieces import CallArguments, CallEnd, CallStart, Content, Reasoning
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import ANSWER, FakeEngine
from tests.entrypoints.openai.test_messages import CALL, named_events
from tests.entrypoints.openai.test_tools import with_reasoning

ASK = {"model": "fake", "input": "Hi"}


def test_an_answer_is_a_list_of_items(api: Api):
    body = api.post("/v1/responses", ASK).json()
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "fake")
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}]
    prompt = api.engine.calls[-1].prompt["prompt_token_ids"]
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"]) == (len(prompt), len(ANSWER.encode()))


def test_the_prompt_is_the_one_of_chat(api: Api):
    items = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "c"}, {"type": "input_text", "text": "d"}]},
    ]
    api.post("/v1/responses", {"input": items, "instructions": "be brief"})
    api.chat(messages=[
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c\nd"},
    ])  # fmt: skip
    assert api.engine.calls[0].prompt == api.engine.calls[1].prompt


def test_the_parameters_reach_the_engine(api: Api):
    fields = {"temperature": 0.5, "top_p": 0.25, "top_k": 3, "seed": 5, "max_output_tokens": 7, "stop": "x"}
    body = api.post("/v1/responses", {**ASK, **fields}).json()
    params = api.engine.calls[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (0.5, 0.25, 3, 5, 7)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (body["temperature"], body["max_output_tokens"]) == (0.5, 7)


def test_logprobs_come_with_the_text(api: Api):
    ask = {**ASK, "top_logprobs": 2, "max_output_tokens": 3}
    (part,) = api.post("/v1/responses", ask).json()["output"][0]["content"]
    assert len(part["logprobs"]) == 3 and len(part["logprobs"][0]["top_logprobs"]) == 2
    events = named_events(api.post("/v1/responses", {**ask, "stream": True}).text)
    assert events[-1][1]["response"]["output"][0]["content"][0]["logprobs"] == part["logprobs"]


def test_a_stream_says_the_same_as_the_whole(api: Api):
    events = named_events(api.post("/v1/responses", {**ASK, "stream": True}).text)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    names = [name.removeprefix("response.") for name, _ in events]
    assert [name for name in names if name != "output_text.delta"] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done", "content_part.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert events[0][1]["response"]["output"] == []
    text = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
    whole = api.post("/v1/responses", ASK).json()
    last = events[-1][1]["response"]
    assert text == last["output"][0]["content"][0]["text"] == whole["output"][0]["content"][0]["text"]
    assert last["usage"] == whole["usage"]


def test_a_stream_that_fails_says_so_last(api: Api):
    api.engine.fail_after, api.engine.failure = 3, EngineGenerateError("one step failed")
    name, data = named_events(api.post("/v1/responses", {**ASK, "stream": True}).text)[-1]
    assert (name, data["response"]["status"]) == ("response.failed", "failed")
    assert data["response"]["error"]["message"] == "one step failed"


def test_openais_client_reads_both(api: Api):
    async def talk(client: httpx.AsyncClient) -> None:
        sdk = openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=client, max_retries=0)
        first = await sdk.responses.create(model="fake", input="Hi")
        assert first.output_text == ANSWER
        stream = await sdk.responses.create(model="fake", input="Go on", previous_response_id=first.id, stream=True)
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        assert text == ANSWER
        assert (await sdk.responses.retrieve(first.id)).output_text == ANSWER
        await sdk.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(first.id)

    api.run(talk)
    api.chat(messages=[
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "Go on"},
    ])  # fmt: skip
    assert api.engine.calls[1].prompt == api.engine.calls[2].prompt


def test_what_is_not_stored_is_not_found(api: Api):
    body = api.post("/v1/responses", {**ASK, "store": False}).json()
    assert api.get(f"/v1/responses/{body['id']}").status_code == 404
    error = api.post("/v1/responses", {**ASK, "previous_response_id": body["id"]}).json()["error"]
    assert (error["code"], error["param"]) == (404, "previous_response_id")
    assert api.post(f"/v1/responses/{body['id']}/cancel", {}).status_code == 404


def stored_body(name: str, **asked):
    made = _begin(ResponsesRequest(input="x", **asked))
    made.id = name
    return made


def test_the_store_drops_the_oldest():
    store = ResponseStore(max_responses=2)
    for name in "abc":
        store.put(stored_body(name), [])
    store.get("b")
    store.put(stored_body("d"), [])
    assert store.get("b") and store.get("d")
    for name in "ac":
        with pytest.raises(NotFoundError):
            store.get(name)
    small = ResponseStore(max_bytes=100)
    small.put(stored_body("a"), [{"content": "x" * 200}])
    with pytest.raises(NotFoundError):
        small.get("a")


def test_what_a_stored_answer_repeats_of_its_request_counts_too():
    store = ResponseStore(max_bytes=5000)
    for name in "ab":
        store.put(stored_body(name, metadata={"a": "x" * 3000}), [])
    assert store.get("b")
    with pytest.raises(NotFoundError):
        store.get("a")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": 3}}, "text.format"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"include": [{}]}, None),
    ],
)
def test_a_wrong_field_is_refused_by_its_own_name(api: Api, change: dict, param: str | None):
    response = api.post("/v1/responses", {**ASK, **change})
    assert response.status_code == 400, response.text
    if param:
        assert response.json()["error"]["param"] == param
    assert api.engine.calls == []


def test_fields_that_change_nothing_are_accepted(api: Api):
    harmless = {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "truncation": "disabled", "include": [],
                "prompt_cache_key": "k", "safety_identifier": "s", "background": False}  # fmt: skip
    answer = api.post("/v1/responses", {**ASK, **harmless, "stream_options": {"include_obfuscation": False}})
    assert answer.status_code == 200 and "x-ignored-fields" not in answer.headers
    assert answer.json()["metadata"] == {"a": "b"}


def delta(*pieces, finish_reason: str | None = None) -> AnswerDelta:
    return AnswerDelta(0, list(pieces), [], None, [], finish_reason, None)


def test_reasoning_text_and_calls_are_items_in_their_order():
    maker = _Maker(_begin(ResponsesRequest(input="x")))
    call = [CallStart(0, "f", "i"), CallArguments(0, '{"x":'), CallArguments(0, "1}"), CallEnd(0, True)]
    events = maker.add(delta(Reasoning("a"), Content("b"))) + maker.add(delta(Content("c"), *call))
    assert events[-1].type == "response.output_item.done"  # as soon as the call is complete
    events += maker.add(delta(finish_reason="tool_calls")) + maker.finish(Usage.of(3, 4))
    reasoning, message, call = maker.body.output
    assert (reasoning.content[0].text, message.content[0].text) == ("a", "bc")
    assert (call.call_id, call.name, call.arguments, call.status) == ("i", "f", '{"x":1}', "completed")
    done = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert done == [reasoning.id, message.id, call.id]
    assert (maker.body.status, maker.body.usage.total_tokens) == ("completed", 7)


@pytest.mark.parametrize(
    ("reason", "status", "details"),
    [("length", "incomplete", {"reason": "max_output_tokens"}), ("abort", "cancelled", None)],
)
def test_what_is_cut_says_so_and_why(reason: str, status: str, details: dict | None):
    maker = _Maker(_begin(ResponsesRequest(input="x")))
    maker.add(delta(Content("a"), CallStart(0, "f", "i"), CallArguments(0, '{"x')))
    maker.add(delta(CallEnd(0, False), finish_reason=reason))
    last = maker.finish(Usage.of(3, 4))[-1]
    message, call = maker.body.output
    assert (message.status, call.arguments, call.status) == ("completed", '{"x', "incomplete")
    assert (last.type, last.response.status) == ("response.incomplete", status)
    assert last.response.incomplete_details == details


def test_a_call_that_goes_wrong_is_incomplete_though_the_answer_is_not():
    maker = _Maker(_begin(ResponsesRequest(input="x")))
    maker.add(delta(CallStart(0, "f", "i"), CallArguments(0, '{"x'), CallEnd(0, False), Content("}")))
    maker.add(delta(finish_reason="stop"))
    maker.finish(Usage.of(3, 4))
    assert [item.status for item in maker.body.output] == ["incomplete", "completed"]
    assert maker.body.status == "completed"


THINKS = "<think>why?</think>Four."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [9, 12, 20, 100])
def test_usage_tells_how_many_tokens_were_reasoning(max_tokens: int, stream: bool):
    """A token of the fake engine is a byte; the marks are no reasoning."""
    api = with_reasoning(THINKS)
    response = api.post("/v1/responses", {**ASK, "max_output_tokens": max_tokens, "stream": stream})
    body = named_events(response.text)[-1][1]["response"] if stream else response.json()
    # Of a text that breaks off within a mark, the beginning of the mark still counts.
    expected = {9: 2, 12: 5, 20: 4, 100: 4}[max_tokens]
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": expected}
    assert body["usage"]["output_tokens"] == min(max_tokens, len(THINKS))
    cut = max_tokens < len(THINKS)
    assert body["status"] == ("incomplete" if cut else "completed")
    assert body["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
    kinds = [item["type"] for item in body["output"]]
    assert kinds == (["reasoning"] if max_tokens < 19 else ["reasoning", "message"])
    assert body["output"][-1]["status"] == ("incomplete" if cut else "completed")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_reasoning_are_no_texts(stream: bool):
    api = with_reasoning("why?</think>Four.", "deepseek_r1")
    response = api.post("/v1/responses", {**ASK, "top_logprobs": 1, "stream": stream})
    body = named_events(response.text)[-1][1]["response"] if stream else response.json()
    (part,) = body["output"][1]["content"]
    assert "".join(row["token"] for row in part["logprobs"]) == part["text"] == "Four."


def test_items_become_chats_messages():
    assert input_messages([
        {"role": "user", "content": "q"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "look"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
    ]) == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "look", "reasoning": "hm", "tool_calls": [
            {"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in ("c1", "c2")]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
    ]  # fmt: skip
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    function = {"name": "f", "parameters": {"type": "object"}, "strict": True}
    assert _tool(tool, "tools[0]") == {"type": "function", "function": function}
    assert _tool_choice({"type": "function", "name": "f"}) == {"type": "function", "function": {"name": "f"}}


def test_calls_come_through_chats_parser_and_their_results_go_back(engine: FakeEngine):
    engine.answer = CALL
    api = Api(engine, enable_auto_tool_choice=True, tool_call_parser="hermes")
    tools = [{"type": "function", "name": "get", "parameters": {"type": "object"}}]
    body = api.post("/v1/responses", {**ASK, "tools": tools}).json()
    message, call = body["output"]
    assert (message["content"][0]["text"].strip(), call["name"]) == ("Look:", "get")
    assert json.loads(call["arguments"]) == {"city": "Paris"}
    events = named_events(api.post("/v1/responses", {**ASK, "tools": tools, "stream": True}).text)
    (done,) = [data for name, data in events if name == "response.function_call_arguments.done"]
    assert done["arguments"] == call["arguments"]
    engine.answer = ANSWER
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}
    follow_up = {"input": [result], "previous_response_id": body["id"], "tools": tools}
    assert api.post("/v1/responses", follow_up).json()["output"][0]["content"][0]["text"] == ANSWER
    prompt = bytes(api.engine.calls[-1].prompt["prompt_token_ids"]).decode()
    assert "<tool>sun" in prompt


def test_a_schema_constrains_the_text_as_in_chat(api: Api):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    format_ = {"type": "json_schema", "name": "x", "schema": schema}
    api.post("/v1/responses", {**ASK, "text": {"format": format_}})
    api.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    first, second = (call.params.structured_outputs for call in api.engine.calls)
    assert first == second and first is not None
