"""POST /v1/messages: Anthropic's bodies and events, through the same prompt as chat."""

from __future__ import annotations

import json

import pytest

from minivllm.entrypoints.openai.chat_completion.job import AnswerDelta
from minivllm.entrypoints.openai.messages.convert import to_chat
from minivllm.entrypoints.openai.messages.protocol import (
    BlockStart,
    Message,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from minivllm.entrypoints.openai.messages.serving import _Maker
from minivllm.entrypoints.openai.protocol import Usage
from minivllm.exceptions import EngineGenerateError
from minivllm.tool_parsers.pieces import CallArguments, CallEnd, CallStart, Content, Reasoning
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import ANSWER, FakeEngine

ASK = {"model": "fake", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}


def named_events(text: str) -> list[tuple[str, dict]]:
    """(name, data) of each event; the name is the data's type."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        assert events[-1][0] == events[-1][1]["type"]
    return events


def test_an_answer_has_anthropics_shape(api: Api):
    answer = api.post("/v1/messages", ASK).json()
    assert answer["id"].startswith("msg_")
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "fake")
    assert answer["content"] == [{"type": "text", "text": ANSWER}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    asked = api.engine.calls[-1]
    assert answer["usage"]["input_tokens"] == len(asked.prompt["prompt_token_ids"])
    assert answer["usage"]["output_tokens"] == len(ANSWER.encode())


def test_the_prompt_is_the_one_of_chat(api: Api):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "d"},
    ]
    body = {**ASK, "messages": messages, "system": [{"type": "text", "text": "be brief"}]}
    api.post("/v1/messages", body)
    chat = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"},
    ]  # fmt: skip
    api.chat(messages=chat)
    first, second = api.engine.calls
    assert first.prompt == second.prompt
    count = api.post("/v1/messages/count_tokens", {k: v for k, v in body.items() if k != "max_tokens"})
    assert count.json() == {"input_tokens": len(first.prompt["prompt_token_ids"])}


def test_the_parameters_reach_the_engine(api: Api):
    fields = {"temperature": 0.5, "top_k": 3, "top_p": 0.25, "stop_sequences": ["x"], "max_tokens": 7}
    answer = api.post("/v1/messages", {**ASK, **fields, "metadata": {"user_id": "u"}})
    assert "x-ignored-fields" not in answer.headers
    params = api.engine.calls[-1].params
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.5, 3, 0.25, 7)
    assert params.stop == ["x"]
    assert answer.json()["stop_reason"] == "max_tokens"


def test_a_stream_says_the_same_as_the_whole(api: Api):
    response = api.post("/v1/messages", {**ASK, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = named_events(response.text)
    assert [name for name, _ in events if name != "content_block_delta"] == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    whole = api.post("/v1/messages", ASK).json()
    assert events[0][1]["message"]["usage"] == {**whole["usage"], "output_tokens": 0}
    text = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
    assert [{"type": "text", "text": text}] == whole["content"]
    delta = events[-2][1]
    assert (delta["delta"], delta["usage"]) == ({"stop_reason": "end_turn", "stop_sequence": None}, whole["usage"])


def test_a_stream_that_fails_ends_with_an_error_event(api: Api):
    api.engine.fail_after, api.engine.failure = 3, EngineGenerateError("one step failed")
    response = api.post("/v1/messages", {**ASK, "stream": True}, headers={"X-Request-Id": "mine"})
    name, data = named_events(response.text)[-1]
    assert (name, data["error"]) == ("error", {"type": "api_error", "message": "one step failed"})
    assert data["request_id"] == "mine"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"stop_sequences": ["a"] * 5}, "stop"),
        ({"temperature": 5}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0]"),
        ({"tool_choice": {"type": "some"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "less than max_tokens"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"container": "c"}, "container"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_in_anthropics_shape(api: Api, change: dict, names: str):
    response = api.post("/v1/messages", {**ASK, **change})
    assert response.status_code == 400, response.text
    assert response.json()["type"] == "error"
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert names in error["message"]


def test_other_errors_have_its_shape_too(engine: FakeEngine):
    api = Api(engine, api_key=["k"])
    for response in [api.post("/v1/messages", ASK, headers={"X-Request-Id": "mine"}), api.post("/v1/messages", ASK)]:
        assert response.json()["request_id"] == response.headers["x-request-id"]
    kinds = {
        401: api.post("/v1/messages", ASK),
        404: api.post("/v1/messages", {**ASK, "model": "nobody"}, headers={"x-api-key": "k"}),
        405: api.get("/v1/messages", headers={"x-api-key": "k"}),
    }
    for status, response in kinds.items():
        assert (response.status_code, response.json()["type"]) == (status, "error")
    assert kinds[401].json()["error"]["type"] == "authentication_error"
    assert kinds[404].json()["error"]["type"] == "not_found_error"


def maker_of(*deltas: tuple[str | None, list], stop_reason: str | None = None) -> tuple[Message, list]:
    """The message of these deltas, (finish_reason, pieces), and its events."""
    message = Message("msg_1", "fake", [])
    maker = _Maker(message)
    events = [
        event
        for reason, pieces in deltas
        for event in maker.add(AnswerDelta(0, pieces, [], None, [], reason, stop_reason))
    ]
    return message, events + maker.finish(Usage.of(3, 4))


def test_reasoning_text_and_calls_are_blocks_in_their_order():
    message, events = maker_of(
        (None, [Reasoning("a"), Reasoning("b"), Content("c"), CallStart(0, "f", "id1"), CallArguments(0, "{}")]),
        (None, [CallEnd(0, True), CallStart(1, "g", "id2"), CallArguments(1, '{"x":'), CallArguments(1, "1}")]),
        ("tool_calls", [CallEnd(1, True)]),
    )
    tags = [type(event).__name__ for event in events]
    block = ["BlockStart", "BlockDelta", "BlockStop"]
    thinking = ["BlockStart", "BlockDelta", "BlockDelta", "BlockStop"]
    assert tags == [*thinking, *block, *block, *thinking, "MessageDelta", "MessageStop"]
    assert [e.index for e in events[:-2]] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert events[-2].delta.stop_reason == message.stop_reason == "tool_use"
    assert [block.content_block for block in events if isinstance(block, BlockStart)] == [
        ThinkingBlock(""), TextBlock(""), ToolUseBlock("id1", "f", {}), ToolUseBlock("id2", "g", {}),
    ]  # fmt: skip
    assert message.content == [
        ThinkingBlock("ab"), TextBlock("c"), ToolUseBlock("id1", "f", {}), ToolUseBlock("id2", "g", {"x": 1}),
    ]  # fmt: skip


CALLED = [CallStart(0, "f", "i"), CallArguments(0, "{}"), CallEnd(0, True)]


@pytest.mark.parametrize(
    ("reason", "stopped_by", "pieces", "told"),
    [
        ("stop", None, [Content("a")], ("end_turn", None)),
        ("stop", 7, [Content("a")], ("end_turn", None)),
        ("stop", "END", [Content("a")], ("stop_sequence", "END")),
        ("stop", None, CALLED, ("tool_use", None)),  # chat's reason where the call was asked for by name
        ("tool_calls", None, CALLED, ("tool_use", None)),
        ("length", None, CALLED, ("max_tokens", None)),
        ("abort", None, [Content("a")], (None, None)),
        ("repetition", None, [Content("a")], ("end_turn", None)),
    ],
)
def test_the_stop_reason_is_anthropics(reason: str, stopped_by: int | str | None, pieces: list, told: tuple):
    message, events = maker_of((reason, pieces), stop_reason=stopped_by)
    assert (message.stop_reason, message.stop_sequence) == told
    assert (events[-2].delta.stop_reason, events[-2].delta.stop_sequence) == told


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_length_cuts_ends_with_max_tokens_and_no_made_up_input(engine: FakeEngine, stream: bool):
    engine.answer = CALL
    api = Api(engine, enable_auto_tool_choice=True, tool_call_parser="hermes")
    response = api.post("/v1/messages", {**ASK, "tools": [TOOL], "max_tokens": len(CALL) - 20, "stream": stream})
    if stream:
        events = named_events(response.text)
        assert events[-2][1]["delta"]["stop_reason"] == "max_tokens"
        begun = "".join(d["delta"].get("partial_json", "") for n, d in events if n == "content_block_delta")
        assert begun and '{"city": "Paris"}'.startswith(begun)
    else:
        assert response.json()["stop_reason"] == "max_tokens"
        assert response.json()["content"][-1]["input"] == {}


def test_tools_and_their_results_are_chats():
    request = MessagesRequest(
        **ASK | {
            "messages": [
                {"role": "user", "content": "weather?"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "look"},
                    {"type": "tool_use", "id": "t1", "name": "get", "input": {"city": "Paris"}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
                    {"type": "text", "text": "so?"}]},
            ],
        }
    )  # fmt: skip
    from minivllm.entrypoints.openai.messages.convert import _messages, _tool, _tool_choice

    user, assistant, result, follow_up = _messages(request)
    assert (assistant["content"], assistant["reasoning"]) == ("look", "hm")
    assert assistant["tool_calls"] == [
        {"id": "t1", "type": "function", "function": {"name": "get", "arguments": '{"city": "Paris"}'}}
    ]
    assert result == {"role": "tool", "tool_call_id": "t1", "content": "sun"}
    assert follow_up["role"] == "user"
    tool = _tool({"name": "get", "description": "d", "input_schema": {"type": "object"}}, "tools[0]")
    assert tool["function"] == {"name": "get", "description": "d", "parameters": {"type": "object"}}
    assert _tool_choice({"type": "any", "disable_parallel_tool_use": True}) == {
        "tool_choice": "required", "parallel_tool_calls": False,
    }  # fmt: skip
    assert to_chat(MessagesRequest(**ASK)).max_tokens == 100


TOOL = {"name": "get", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = 'Look:\n<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call>'


def test_calls_come_through_chats_parser_whole_and_streamed(engine: FakeEngine):
    engine.answer = CALL
    api = Api(engine, enable_auto_tool_choice=True, tool_call_parser="hermes")
    whole = api.post("/v1/messages", {**ASK, "tools": [TOOL]}).json()
    text, call = whole["content"]
    assert (text["text"].strip(), call["name"], call["input"]) == ("Look:", "get", {"city": "Paris"})
    assert whole["stop_reason"] == "tool_use"
    events = named_events(api.post("/v1/messages", {**ASK, "tools": [TOOL], "stream": True}).text)
    deltas = [data["delta"] for name, data in events if name == "content_block_delta"]
    assert "".join(delta.get("text", "") for delta in deltas) == text["text"]
    assert json.loads("".join(delta.get("partial_json", "") for delta in deltas)) == call["input"]
    assert events[-2][1]["delta"]["stop_reason"] == "tool_use"
