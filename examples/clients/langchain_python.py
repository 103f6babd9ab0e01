"""LangChain's client: pip install langchain-openai; python langchain_python.py

Chat, streaming with usage, bound tools, structured output, completions, and the exception of each error. See README.md
for the server that it asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from openai import OpenAI as Client
from pydantic import BaseModel, Field

BASE_URL = os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("KEY", "example")

MODEL = Client(base_url=BASE_URL, api_key=KEY).models.list().data[0].id
COMMON = {"base_url": BASE_URL, "api_key": KEY, "model": MODEL, "max_retries": 0}
model = ChatOpenAI(**COMMON, temperature=0, max_tokens=60, stream_usage=True)
WEATHER = HumanMessage("What is the weather in Paris?")


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=99)


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city"""
    return '{"weather": "sunny"}'


def chat() -> str:
    answer = model.invoke("Hello!")
    assert answer.usage_metadata["output_tokens"] > 0 and answer.response_metadata["finish_reason"] == "stop"
    return answer.content


def streamed_chat_with_usage() -> str:
    question = "Tell me a story about a fox."
    chunks = list(model.stream(question))
    whole = sum(chunks[1:], chunks[0])
    assert whole.content == model.invoke(question).content
    assert whole.usage_metadata["output_tokens"] == 60
    return f"{len(chunks)} chunks, {whole.usage_metadata['total_tokens']} tokens"


def tools() -> str:
    able = model.bind_tools([get_weather], strict=True)  # the server holds the calls to the schema
    answer = able.invoke([WEATHER])
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    return able.invoke([WEATHER, answer, result]).content


def streamed_tools() -> str:
    chunks = list(model.bind_tools([get_weather], strict=True).stream([WEATHER]))
    (call,) = sum(chunks[1:], chunks[0]).tool_calls
    assert call["args"] == {"city": "Paris"}
    return str(call["args"])


def structured_output(method: str) -> str:
    return str(model.with_structured_output(Person, method=method).invoke("Hello!"))


def structured_output_by_schema() -> str:
    return structured_output("json_schema")


def structured_output_by_a_forced_tool() -> str:
    return structured_output("function_calling")


def responses_api() -> str:
    answer = ChatOpenAI(**COMMON, temperature=0, use_responses_api=True).invoke("Hello!")
    return answer.text if isinstance(answer.text, str) else answer.text()


def completion() -> str:
    return OpenAI(**COMMON, max_tokens=8, temperature=0).invoke("Once upon a time")


def errors() -> str:
    embeddings = OpenAIEmbeddings(**COMMON, check_embedding_ctx_length=False)  # else it fetches OpenAI's tokenizer
    raised = [
        _raises(openai.BadRequestError, lambda: model.bind(temperature=-1).invoke("Hello!")),
        _raises(openai.AuthenticationError, lambda: ChatOpenAI(**{**COMMON, "api_key": "wrong"}).invoke("Hello!")),
        _raises(openai.NotFoundError, lambda: ChatOpenAI(**{**COMMON, "model": "other"}).invoke("Hello!")),
        _raises(openai.NotFoundError, lambda: embeddings.embed_query("no embeddings here")),
    ]
    return ", ".join(f"{error.status_code} {type(error).__name__}" for error in raised)


def too_many_at_once() -> str:
    """More than --max-num-queued-reqs: some are answered, the rest are told to come again."""
    asked = model.bind(max_tokens=200).batch(["Tell me a story."] * 32, {"max_concurrency": 32}, return_exceptions=True)
    refused = [answer for answer in asked if isinstance(answer, Exception)]
    assert 0 < len(refused) < 32
    assert all(isinstance(error, openai.InternalServerError) and error.status_code == 503 for error in refused)
    return f"{32 - len(refused)} answered, {len(refused)} told 503"


def _raises(kind: type[openai.APIStatusError], call: Callable[[], object]) -> openai.APIStatusError:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    print(f"langchain-openai {version('langchain-openai')}, openai {openai.__version__} against {BASE_URL}")
    for step in (
        chat, streamed_chat_with_usage, tools, streamed_tools, structured_output_by_schema,
        structured_output_by_a_forced_tool, responses_api, completion, errors, too_many_at_once,
    ):  # fmt: skip
        print(f"{step.__name__}: {step()!r}"[:160])
