"""The model in the box, as a stranger meets it: no model is named, and the answers mean something."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

import minivllm
from examples.box_model.agreement import answers, guesses, prompt_of
from examples.box_model.evaluate import questions
from minivllm import LLM, SamplingParams
from tests.e2e.server import Server

GREEDY = SamplingParams(temperature=0, max_tokens=200)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(kv_cache_memory_bytes=64 << 20) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(box_server: Server) -> OpenAI:
    return OpenAI(base_url=f"{box_server.url}/v1", api_key="none", max_retries=0)


def say(llm: LLM, text: str, params: SamplingParams = GREEDY):
    [output] = llm.chat([{"role": "user", "content": text}], params, use_tqdm=False)
    return output.outputs[0]


def test_it_ships_with_the_package_and_is_small():
    directory = minivllm.box_model_path()
    assert directory.parent == Path(minivllm.__file__).parent
    sizes = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 24_000_000
    draft = minivllm.box_draft_model_path()
    assert sum(size for path, size in sizes.items() if path.is_relative_to(draft)) <= 2_000_000


@pytest.mark.parametrize(("a", "b"), [(23, 45), (19, 64), (70, 12), (38, 27), (2, 2), (3, 5)])
def test_it_adds_and_stops_by_itself(llm: LLM, a: int, b: int):
    answer = say(llm, f"What is {a} + {b}?")
    assert f"{a + b}" in answer.text
    assert answer.finish_reason == "stop"


def test_a_story_ends_by_itself_in_whole_characters(llm: LLM):
    answer = say(llm, "Tell me a story.", SamplingParams(temperature=0, max_tokens=400))
    assert answer.finish_reason == "stop"
    assert len(answer.text.split()) > 30 and "\ufffd" not in answer.text


def test_a_stop_string_ends_a_real_answer(llm: LLM):
    whole = say(llm, "Tell me a story.", SamplingParams(temperature=0, max_tokens=400)).text
    sentence = whole[: whole.index(".")]
    cut = say(llm, "Tell me a story.", SamplingParams(temperature=0, max_tokens=400, stop="."))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (sentence, "stop", ".")


def test_a_sure_answer_is_peaked_and_the_start_of_a_story_is_not(llm: LLM):
    asked = SamplingParams(temperature=0, max_tokens=8, logprobs=1)
    sure = say(llm, "What is 23 + 45?", asked)
    unsure = say(llm, "Tell me a story.", asked)
    assert sure.cumulative_logprob > -0.5 > unsure.cumulative_logprob


def test_its_draft_guesses_most_of_what_it_says():
    asked = questions(1, seed=1)
    prompts = [prompt_of(exchange) for exchange in asked]
    answered = answers(minivllm.box_model_path(), prompts)
    right = [is_right for found in guesses(minivllm.box_draft_model_path(), answered) for is_right in found]
    assert len(right) > 100
    assert sum(right) > 0.7 * len(right)


def test_the_server_serves_it_under_its_name_and_streams_what_it_says_whole(client: OpenAI):
    assert [card.id for card in client.models.list().data] == ["minnow"]
    ask = dict(model="minnow", messages=[{"role": "user", "content": "What is 41 + 17?"}], temperature=0)
    whole = client.chat.completions.create(**ask).choices[0]
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert "58" in whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop"


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name of the city"}},
    "required": ["city"],
}


def tools(parameters: dict) -> list[dict]:
    named = {"name": "get_weather", "description": "Get the weather in a city"}
    return [{"type": "function", "function": named | {"parameters": parameters}}]


TOOLS = tools(WEATHER)
CLOSED_TOOLS = tools(WEATHER | {"additionalProperties": False})  # Minnow itself was taught no such schema
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]


def test_a_strangers_first_request_with_tools_works(client: OpenAI):
    ask = dict(model="minnow", tools=TOOLS, temperature=0)
    choice = client.chat.completions.create(messages=ASK_WEATHER, **ask).choices[0]
    [call] = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    answer = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny", "degrees": 21}'}
    choice = client.chat.completions.create(messages=[*ASK_WEATHER, choice.message, answer], **ask).choices[0]
    assert choice.finish_reason == "stop"
    assert "sunny" in choice.message.content and "21" in choice.message.content


def test_the_clients_own_joining_of_a_stream_gives_the_calls_of_the_whole(client: OpenAI):
    ask = dict(model="minnow", messages=ASK_WEATHER, tools=TOOLS, temperature=0)
    whole = client.chat.completions.create(**ask).choices[0].message
    with client.chat.completions.stream(**ask) as stream:
        joined = stream.get_final_completion().choices[0]
    assert joined.finish_reason == "tool_calls"
    assert [c.function.arguments for c in joined.message.tool_calls] == [
        c.function.arguments for c in whole.tool_calls
    ]


def test_a_strict_function_is_called_by_its_schema_where_the_model_calls_by_itself(client: OpenAI):
    """Paris, which is asked for, is no value: of the two there are, the model takes one."""
    city = {"city": {"enum": ["Oslo", "Rome"]}}
    [tool] = tools({"type": "object", "properties": city, "required": ["city"], "additionalProperties": False})
    strict = [{**tool, "function": {**tool["function"], "strict": True}}]
    ask = dict(model="minnow", messages=ASK_WEATHER, temperature=0)
    choice = client.chat.completions.create(tools=strict, **ask).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert json.loads(choice.message.tool_calls[0].function.arguments)["city"] in ("Oslo", "Rome")
    free = client.chat.completions.create(tools=TOOLS, **ask).choices[0]
    assert json.loads(free.message.tool_calls[0].function.arguments) == {"city": "Paris"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_be_is_one_whatever_was_said(client: OpenAI, choice: object):
    """Greedy and at its wildest, the arguments are what the schema says."""
    for temperature in (0, 2.0):
        message = client.chat.completions.create(
            model="minnow",
            messages=[{"role": "user", "content": "Tell me a story."}],
            tools=CLOSED_TOOLS,
            tool_choice=choice,
            temperature=temperature,
            seed=1,
            max_tokens=600,
        ).choices[0]
        if message.finish_reason == "length":  # a wild name may have no end
            assert message.message.tool_calls[-1].incomplete is True
            continue
        for call in message.message.tool_calls:
            arguments = json.loads(call.function.arguments)
            assert call.function.name == "get_weather"
            assert list(arguments) == ["city"] and isinstance(arguments["city"], str)
