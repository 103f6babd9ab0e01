"""The official Python client: pip install openai; python openai_python.py

Chat, completions, responses, tools, structured output, usage, and the exception of each error. See README.md for the
server that it asks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
from openai import OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("KEY", "example")

client = OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
MODEL = client.models.list().data[0].id
HELLO = [{"role": "user", "content": "Hello!"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GET_WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def chat() -> str:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=50)
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens > 0
    return answer.choices[0].message.content


def streamed_chat_with_usage() -> str:
    ask = dict(model=MODEL, messages=STORY, temperature=0, max_tokens=60)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == client.chat.completions.create(**ask).choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 60
    return f"{len(chunks)} chunks, {chunks[-1].usage.total_tokens} tokens"


def completion_with_logprobs() -> str:
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, logprobs=2, seed=1)
    assert len(answer.choices[0].logprobs.token_logprobs) == 8
    return answer.choices[0].text


def tools() -> str:
    ask = dict(model=MODEL, temperature=0, tools=[{"type": "function", "function": GET_WEATHER}])
    message = client.chat.completions.create(messages=WEATHER, **ask).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'}
    return client.chat.completions.create(messages=[*WEATHER, message, result], **ask).choices[0].message.content


def streamed_tools() -> str:
    ask = dict(model=MODEL, messages=WEATHER, tools=[{"type": "function", "function": GET_WEATHER}], temperature=0)
    with client.chat.completions.stream(**ask) as stream:  # the client puts the pieces together
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    return call.function.arguments


def structured_output() -> str:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, response_format=schema, max_tokens=80)
    person = json.loads(answer.choices[0].message.content)
    assert set(person) == {"name", "age"}
    return answer.choices[0].message.content


def response() -> str:
    answer = client.responses.create(model=MODEL, input="Hello!", temperature=0, max_output_tokens=50)
    assert answer.status == "completed" and answer.usage.output_tokens > 0
    return answer.output_text


def streamed_response() -> str:
    ask = dict(model=MODEL, input="Tell me a story about a fox.", temperature=0, max_output_tokens=200)
    events = list(client.responses.create(**ask, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == client.responses.create(**ask).output_text
    return f"{len(events)} events, {events[-1].response.usage.total_tokens} tokens"


def streamed_response_with_a_tool() -> str:
    tool = {"type": "function", "strict": False, **GET_WEATHER}
    events = list(client.responses.create(model=MODEL, input=WEATHER, tools=[tool], temperature=0, stream=True))
    pieces = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    (call,) = [item for item in events[-1].response.output if item.type == "function_call"]
    assert pieces == call.arguments and json.loads(pieces) == {"city": "Paris"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"weather": "sunny"}'}
    return client.responses.create(model=MODEL, input=[*WEATHER, call, result], tools=[tool], temperature=0).output_text


def the_response_before_is_remembered() -> str:
    first = client.responses.create(model=MODEL, input="Hello!", temperature=0)
    second = client.responses.create(
        model=MODEL, input="What is 3 + 4?", previous_response_id=first.id, temperature=0
    )
    assert second.usage.input_tokens > first.usage.total_tokens
    client.responses.delete(first.id)
    return second.output_text


def errors() -> str:
    stranger = OpenAI(base_url=BASE_URL, api_key="wrong", max_retries=0)
    ask = dict(model=MODEL, messages=HELLO)
    raised = [
        _raises(openai.BadRequestError, lambda: client.chat.completions.create(**ask, temperature=-1)),
        _raises(openai.AuthenticationError, lambda: stranger.models.list()),
        _raises(openai.NotFoundError, lambda: client.chat.completions.create(model="other", messages=HELLO)),
        _raises(openai.NotFoundError, lambda: client.embeddings.create(model=MODEL, input="no embeddings here")),
    ]
    assert raised[0].param == "temperature" and "embeddings" in raised[3].message
    return ", ".join(f"{error.status_code} {type(error).__name__}" for error in raised)


def too_many_at_once() -> str:
    """More than --max-num-queued-reqs: some are answered, the rest are told to come again."""

    def one(_: int) -> int:
        try:
            client.completions.create(model=MODEL, prompt="Once", max_tokens=1000, extra_body={"ignore_eos": True})
        except openai.InternalServerError as error:
            return error.status_code
        return 200

    with ThreadPoolExecutor(32) as pool:
        statuses = list(pool.map(one, range(32)))
    assert set(statuses) == {200, 503}, statuses
    return f"{statuses.count(200)} answered, {statuses.count(503)} told 503"


def _raises(kind: type[openai.APIStatusError], call: Callable[[], object]) -> openai.APIStatusError:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    print(f"openai {openai.__version__} against {BASE_URL}")
    for step in (
        chat, streamed_chat_with_usage, completion_with_logprobs, tools, streamed_tools, structured_output, response,
        streamed_response, streamed_response_with_a_tool, the_response_before_is_remembered, errors, too_many_at_once,
    ):  # fmt: skip
        print(f"{step.__name__}: {step()!r}"[:160])
