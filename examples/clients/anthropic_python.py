"""Anthropic's client on /v1/messages: pip install anthropic; python anthropic_python.py

Messages, streaming, tools, counting tokens, and the exception of each error. See README.md for the server that it asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import anthropic
from anthropic import Anthropic

BASE_URL = os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1").removesuffix("/v1")  # this client adds it
KEY = os.environ.get("KEY", "example")

client = Anthropic(base_url=BASE_URL, api_key=KEY, max_retries=0)
MODEL = client.models.list().data[0].id
HELLO = [{"role": "user", "content": "Hello!"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY = {"temperature": 0}  # the client of version 2 has no argument for it any more
GET_WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def message() -> str:
    answer = client.messages.create(model=MODEL, messages=HELLO, max_tokens=50, extra_body=GREEDY)
    assert answer.stop_reason == "end_turn" and answer.usage.output_tokens > 0
    return answer.content[0].text


def streamed_message_with_usage() -> str:
    ask = dict(model=MODEL, messages=STORY, max_tokens=60, extra_body=GREEDY)
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert last.content[0].text == text == client.messages.create(**ask).content[0].text
    assert (last.stop_reason, last.usage.output_tokens) == ("max_tokens", 60)
    return f"{last.usage.input_tokens} + {last.usage.output_tokens} tokens"


def tools() -> str:
    ask = dict(model=MODEL, tools=[GET_WEATHER], max_tokens=100, extra_body=GREEDY)
    answer = client.messages.create(messages=WEATHER, **ask)
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use" and call.input == {"city": "Paris"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"weather": "sunny"}'}
    turns = [*WEATHER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    return client.messages.create(messages=turns, **ask).content[0].text


def streamed_tools() -> str:
    with client.messages.stream(
        model=MODEL, messages=WEATHER, tools=[GET_WEATHER], max_tokens=100, extra_body=GREEDY
    ) as stream:
        (call,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert call.input == {"city": "Paris"}
    return str(call.input)


def a_forced_tool() -> str:
    choice = {"type": "tool", "name": "get_weather"}
    answer = client.messages.create(
        model=MODEL, messages=HELLO, tools=[GET_WEATHER], tool_choice=choice, max_tokens=100, extra_body=GREEDY
    )
    return str([block.input for block in answer.content if block.type == "tool_use"])


def structured_output() -> str:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    answer = client.messages.create(
        model=MODEL, messages=HELLO, max_tokens=60, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    return answer.content[0].text


def counted_tokens() -> str:
    count = client.messages.count_tokens(model=MODEL, messages=STORY, tools=[GET_WEATHER]).input_tokens
    asked = client.messages.create(model=MODEL, messages=STORY, tools=[GET_WEATHER], max_tokens=1)
    assert count == asked.usage.input_tokens
    return f"{count} tokens"


def errors() -> str:
    stranger = Anthropic(base_url=BASE_URL, api_key="wrong", max_retries=0)
    ask = dict(model=MODEL, messages=HELLO, max_tokens=10)
    raised = [
        _raises(anthropic.BadRequestError, lambda: client.messages.create(**ask, extra_body={"temperature": -1})),
        _raises(anthropic.AuthenticationError, lambda: stranger.messages.create(**ask)),
        _raises(anthropic.NotFoundError, lambda: client.messages.create(**{**ask, "model": "other"})),
    ]
    assert [error.body["error"]["type"] for error in raised] == [
        "invalid_request_error", "authentication_error", "not_found_error",
    ]  # fmt: skip
    return ", ".join(f"{error.status_code} {type(error).__name__}" for error in raised)


def too_many_at_once() -> str:
    """More than --max-num-queued-reqs: some are answered, the rest are told to come again."""

    def one(_: int) -> int:
        try:
            client.messages.create(model=MODEL, messages=STORY, max_tokens=200)
        except anthropic.APIStatusError as error:
            assert error.body["error"]["type"] == "overloaded_error", error.body
            return error.status_code
        return 200

    with ThreadPoolExecutor(32) as pool:
        statuses = list(pool.map(one, range(32)))
    assert set(statuses) == {200, 503}, statuses
    return f"{statuses.count(200)} answered, {statuses.count(503)} told 503"


def _raises(kind: type[anthropic.APIStatusError], call: Callable[[], object]) -> anthropic.APIStatusError:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    print(f"anthropic {anthropic.__version__} against {BASE_URL}")
    for step in (
        message, streamed_message_with_usage, tools, streamed_tools, a_forced_tool, structured_output, counted_tokens,
        errors, too_many_at_once,
    ):  # fmt: skip
        print(f"{step.__name__}: {step()!r}"[:160])
