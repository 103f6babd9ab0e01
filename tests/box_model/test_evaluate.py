"""The examiner: right answers score, broken words and endless stories do not, and tools are put as the API has them."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import pytest

from examples.box_model import skills
from examples.box_model.chat import segments
from examples.box_model.evaluate import Examiner, Reply, judge, known_words, questions, table, with_ids

STORY = skills.ask("stories", "Tell me a story about Ada the ant.", "Ada the ant slept.", must=("Ada", "ant"))
WORDS = {"Ada", "the", "ant", "slept"}


class FakeClient:
    """A server that knows the answer to an exchange, and parses calls."""

    def __init__(self, exchange: skills.Exchange) -> None:
        self.exchange = exchange
        self.asked: dict = {}
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._chat))

    def _chat(self, **asked):
        self.asked = asked
        calls = [
            SimpleNamespace(function=SimpleNamespace(**call["function"]))
            for call in self.exchange.answer.get("tool_calls", ())
        ]
        message = SimpleNamespace(content=self.exchange.answer["content"], tool_calls=calls or None)
        reason = "tool_calls" if calls else "stop"
        return SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason=reason)])


@pytest.mark.parametrize("maker", [skills.add, skills.call_tool, skills.use_tool_answer])
def test_a_question_is_put_to_the_chat_route_with_its_tools(maker):
    exchange = maker(Random(1), True)
    client = FakeClient(exchange)
    reply = Examiner(client, "model").ask(exchange)
    assert client.asked.get("tools") == (exchange.tools or None)
    assert judge(exchange, reply, set())


def test_calls_and_their_answers_are_named_as_the_api_wants_it():
    exchange = skills.use_tool_answer(Random(1), True)
    named = with_ids(exchange.messages)
    [call] = next(m for m in named if m.get("tool_calls"))["tool_calls"]
    assert next(m for m in named if m["role"] == "tool")["tool_call_id"] == call["id"]
    assert segments(named, exchange.tools) == segments(exchange.messages, exchange.tools)


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
