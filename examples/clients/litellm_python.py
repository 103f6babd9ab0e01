"""LiteLLM, as a proxy or a program uses it: pip install litellm; python litellm_python.py

Under its provider hosted_vllm (and openai, whose requests are the same): chat, streaming with usage, tools, structured
output, completions, and the exception of each error. See README.md for the server that it asks.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from importlib.metadata import version

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a price list

import litellm  # noqa: E402
import openai  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

BASE_URL = os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("KEY", "example")

litellm.suppress_debug_info = True
MODEL = openai.OpenAI(base_url=BASE_URL, api_key=KEY).models.list().data[0].id
COMMON = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE_URL, "api_key": KEY, "max_retries": 0, "temperature": 0}
HELLO = [{"role": "user", "content": "Hello!"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=99)


def chat() -> str:
    answer = litellm.completion(**COMMON, messages=HELLO, max_tokens=50)
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens > 0
    return answer.choices[0].message.content


def chat_as_openai() -> str:
    answer = litellm.completion(**{**COMMON, "model": f"openai/{MODEL}"}, messages=HELLO, max_tokens=50)
    return answer.choices[0].message.content


def streamed_chat_with_usage() -> str:
    ask = dict(**COMMON, messages=STORY, max_tokens=60)
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == litellm.completion(**ask).choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 60
    return f"{len(chunks)} chunks, {chunks[-1].usage.total_tokens} tokens"


def tools() -> str:
    ask = dict(**COMMON, tools=[GET_WEATHER])
    message = litellm.completion(**ask, messages=WEATHER).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'}
    return litellm.completion(**ask, messages=[*WEATHER, message, result]).choices[0].message.content


def streamed_tools() -> str:
    chunks = list(litellm.completion(**COMMON, messages=WEATHER, tools=[GET_WEATHER], stream=True))
    message = litellm.stream_chunk_builder(chunks).choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}
    return message.tool_calls[0].function.arguments


def structured_output() -> str:
    answer = litellm.completion(**COMMON, messages=HELLO, response_format=Person, max_tokens=80)
    return repr(Person.model_validate_json(answer.choices[0].message.content))


def completion() -> str:
    ask = {**COMMON, "model": f"text-completion-openai/{MODEL}"}
    return litellm.text_completion(**ask, prompt="Once upon a time", max_tokens=8).choices[0].text


def anthropic_messages() -> str:
    async def ask() -> dict:
        return await litellm.anthropic.messages.acreate(**COMMON, messages=HELLO, max_tokens=50)

    return asyncio.run(ask())["content"][0]["text"]


def errors() -> str:
    ask = dict(**COMMON, messages=HELLO)
    raised = [
        _raises(litellm.BadRequestError, lambda: litellm.completion(**{**ask, "temperature": -1})),
        _raises(litellm.AuthenticationError, lambda: litellm.completion(**{**ask, "api_key": "wrong"})),
        _raises(litellm.NotFoundError, lambda: litellm.completion(**{**ask, "model": "hosted_vllm/other"})),
        _raises(litellm.NotFoundError, lambda: litellm.embedding(**_without_temperature(), input=["no embeddings"])),
    ]
    return ", ".join(f"{error.status_code} {type(error).__name__}" for error in raised)


def _without_temperature() -> dict:
    return {name: value for name, value in COMMON.items() if name != "temperature"}


def too_many_at_once() -> str:
    """More than --max-num-queued-reqs: some are answered, the rest are told to come again."""

    async def ask() -> list:
        one = [litellm.acompletion(**COMMON, messages=STORY, max_tokens=200) for _ in range(32)]
        return await asyncio.gather(*one, return_exceptions=True)

    answers = asyncio.run(ask())
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    assert 0 < len(refused) < 32
    assert all(isinstance(error, litellm.ServiceUnavailableError) for error in refused), refused[0]
    return f"{32 - len(refused)} answered, {len(refused)} told 503"


def _raises(kind: type[Exception], call: Callable[[], object]) -> Exception:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    print(f"litellm {version('litellm')} against {BASE_URL}")
    for step in (
        chat, chat_as_openai, streamed_chat_with_usage, tools, streamed_tools, structured_output, completion,
        anthropic_messages, errors, too_many_at_once,
    ):  # fmt: skip
        print(f"{step.__name__}: {step()!r}"[:160])
