"""The examiner: right answers score, broken words and endless stories do not, and refusals have a way round."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import httpx
import pytest
from openai import BadRequestError

from examples.box_model import skills
from examples.box_model.chat import assistant_text, segments
from examples.box_model.evaluate import Examiner, Reply, judge, known_words, questions, table

STORY = skills.ask("stories", "Tell me a story about Ada the ant.", "Ada the ant slept.", must=("Ada", "ant"))
WORDS = {"Ada", "the", "ant", "slept"}


class FakeClient:
    """A server that knows the answer to each exchange; its chat route refuses what `refuses` names."""

    def __init__(self, exchange: skills.Exchange, refuses: tuple[str, ...] = ()) -> None:
        self.exchange, self.refuses = exchange, refuses
        self.asked: list[str] = []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._chat))
        self.completions = SimpleNamespace(create=self._complete)

    def _chat(self, *, messages, tools=None, tool_choice="auto", **_):
        self.asked.append(f"chat {tool_choice}" if tools else "chat")
        has_tool_role = any(message["role"] == "tool" for message in messages)
        if ("tools" in self.refuses and tools and tool_choice != "none") or (
            "tool role" in self.refuses and has_tool_role
        ):
            response = httpx.Response(400, request=httpx.Request("POST", "http://server"))
            raise BadRequestError("not yet", response=response, body=None)
        message = SimpleNamespace(content=assistant_text(self.exchange.answer), tool_calls=None)
        return SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason="stop")])

    def _complete(self, *, prompt, **_):
        self.asked.append("completion")
        wanted = "".join(text for text, _ in segments(self.exchange.messages, self.exchange.tools))
        assert prompt == wanted + "<|im_start|>assistant\n"
        choice = SimpleNamespace(text=assistant_text(self.exchange.answer), finish_reason="stop")
        return SimpleNamespace(choices=[choice])


@pytest.mark.parametrize(
    "maker, refuses, asked",
    [
        (skills.add, (), ["chat"]),
        (skills.call_tool, (), ["chat auto"]),
        (skills.call_tool, ("tools",), ["chat auto", "chat none"]),
        (skills.use_tool_answer, ("tools", "tool role"), ["chat auto", "chat none", "completion"]),
    ],
)
def test_a_question_takes_the_first_route_that_accepts_it(maker, refuses, asked):
    exchange = maker(Random(1), True)
    client = FakeClient(exchange, refuses)
    reply = Examiner(client, "model").ask(exchange)
    assert client.asked == asked
    assert judge(exchange, reply, set())


def test_calls_that_the_server_parsed_are_taken_as_they_are():
    exchange = skills.call_tool(Random(1), True)
    function = SimpleNamespace(**exchange.answer["tool_calls"][0]["function"])
    message = SimpleNamespace(content=None, tool_calls=[SimpleNamespace(function=function)])
    reply = Examiner(FakeClient(exchange), "model")._reply(
        SimpleNamespace(message=message, finish_reason="tool_calls")
    )
    assert judge(exchange, reply, set())


@pytest.mark.parametrize(
    "text, finish_reason, right",
    [
        ("Ada the ant slept.", "stop", True),
        ("Ada the ant slept.", "length", False),
        ("Ada the ant slepted.", "stop", False),
        ("the ant slept.", "stop", False),
    ],
)
def test_a_story_is_of_known_words_about_its_hero_and_ends(text, finish_reason, right):
    assert judge(STORY, Reply(text, [], finish_reason), WORDS) is right


def test_the_same_seed_asks_the_same_questions_and_each_has_a_known_story():
    assert questions(2, seed=1) == questions(2, seed=1) != questions(2, seed=2)
    stories = [one.answer["content"] for one in questions(5, seed=1) if one.skill == "stories"]
    vocabulary = known_words()
    assert all(judge(STORY, Reply("Ada the ant. " + text, [], "stop"), vocabulary) for text in stories)


def test_the_table_counts_right_answers():
    assert table({"sums": [True, False]}).splitlines()[-1] == "| sums | 1 | 2 | 50.0% |"
