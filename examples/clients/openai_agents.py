"""The OpenAI Agents SDK: pip install openai-agents; python openai_agents.py

An agent with a tool, whole and streamed, over chat completions and over responses. See README.md for the server that
it asks.
"""

from __future__ import annotations

import asyncio
import os
from importlib.metadata import version

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

BASE_URL = os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("KEY", "example")

set_tracing_disabled(True)  # traces would go to OpenAI
client = AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
asked: list[str] = []


@function_tool  # strict by default: the server holds the calls to the schema
def get_weather(city: str) -> str:
    """Get the weather of a city"""
    asked.append(city)
    return '{"weather": "sunny"}'


def agent(kind: type, model: str) -> Agent:
    return Agent(
        name="Reporter",
        model=kind(model=model, openai_client=client),
        model_settings=ModelSettings(temperature=0, max_tokens=100),
        tools=[get_weather],
    )


async def whole(kind: type, model: str) -> str:
    result = await Runner.run(agent(kind, model), "What is the weather in Paris?")
    assert asked.pop() == "Paris"
    return result.final_output


async def streamed(kind: type, model: str) -> str:
    result = Runner.run_streamed(agent(kind, model), "What is the weather in Paris?")
    events = [event async for event in result.stream_events()]
    assert asked.pop() == "Paris" and any(event.type == "raw_response_event" for event in events)
    return result.final_output


async def main() -> None:
    print(f"openai-agents {version('openai-agents')} against {BASE_URL}")
    model = (await client.models.list()).data[0].id
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        for step in (whole, streamed):
            print(f"{step.__name__} {kind.__name__}: {await step(kind, model)!r}"[:160])


if __name__ == "__main__":
    asyncio.run(main())
