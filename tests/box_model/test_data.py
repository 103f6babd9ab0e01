"""The generator: the same bytes for the same seed, nothing measured that was trained on, answers that are right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from random import Random

import jsonschema
import pytest

from examples.box_model import facts, skills
from examples.box_model.chat import assistant_text, parse_calls
from examples.box_model.data import documents, text_of
from examples.box_model.draw import is_held_out

# SHA-256. A change here means other training text: the model in the box was then not trained on it.
FIRST_MEGABYTE = "4ec366e14eea9a2d0afcf07a3c5df157d2fbcbbe24fc930a95ab216655d40259"
SKILLS_WITH_OWN_CONTENT = [m for m in skills.MIX if m not in (skills.small_talk, skills.no_tool_needed)]


def _exchanges(maker: skills.Maker, held_out: bool, count: int = 60) -> list[skills.Exchange]:
    rng = Random(f"{maker.__name__} {held_out}")
    return [maker(rng, held_out) for _ in range(count)]


def _digest(seed: int, size: int) -> str:
    digest, left = hashlib.sha256(), size
    for document in documents(seed):
        data = text_of(document).encode()[:left]
        digest.update(data)
        left -= len(data)
        if not left:
            return digest.hexdigest()
    raise AssertionError("the stream ended")


def test_the_first_megabyte_of_seed_0_never_changes():
    assert _digest(0, 1_000_000) == FIRST_MEGABYTE


def test_another_seed_gives_other_text():
    assert _digest(1, 10_000) != _digest(0, 10_000)


def test_emphasis_changes_the_mix_and_only_for_makers_there_are():
    def calls(emphasis: dict[str, float]) -> int:
        return sum("<tools>" in text_of(document) for document in islice(documents(0, emphasis), 300))

    assert calls({"call_tool": 5.0}) > 1.5 * calls({})
    with pytest.raises(ValueError, match="'juggle', which is not one of small_talk"):
        next(documents(0, {"juggle": 2.0}))


def _prompt(exchange: skills.Exchange) -> str:
    return json.dumps([exchange.messages, exchange.tools], ensure_ascii=False)


@pytest.mark.parametrize("maker", skills.MIX)
def test_no_held_out_prompt_is_ever_trained_on(maker):
    trained = {_prompt(exchange) for exchange in _exchanges(maker, False, 400)}
    assert trained.isdisjoint(_prompt(exchange) for exchange in _exchanges(maker, True, 100))


@pytest.mark.parametrize("sign", ["+", "-"])
def test_a_held_out_pair_of_numbers_is_in_no_training_sum(sign):
    makers = [skills.add, skills.subtract, skills.sheet, skills.word_problem]
    for answer in _answers(makers, held_out=False):
        for line in answer.splitlines():
            if f" {sign} " in line:
                a, b = (int(part) for part in line.split(" = ")[0].split(f" {sign} "))
                assert max(a, b) < 10 or not is_held_out(f"{min(a, b)} {sign} {max(a, b)}")  # one digit: all taught


def _answers(makers: list[skills.Maker], held_out: bool) -> Iterator[str]:
    for maker in makers:
        for exchange in _exchanges(maker, held_out):
            yield exchange.answer["content"]


@pytest.mark.parametrize("held_out", [False, True])
def test_every_sum_and_difference_is_right(held_out):
    for answer in _answers([skills.add, skills.subtract, skills.sheet, skills.word_problem], held_out):
        for line in answer.splitlines():
            task, result = line.split(" = ")
            a, sign, b = task.split()
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


@pytest.mark.parametrize("maker", [skills.extract, skills.to_schema])
def test_every_json_answer_is_json_and_told_by_the_prompt(maker):
    for exchange in _exchanges(maker, False):
        prompt = " ".join(message["content"] for message in exchange.messages)
        for name, value in json.loads(exchange.answer["content"]).items():
            assert name in prompt and str(value) in prompt


def test_every_answer_to_a_schema_is_valid_under_it():
    for exchange in _exchanges(skills.to_schema, False):
        prompt = next(m["content"] for m in exchange.messages if '"properties"' in m["content"])
        schema, _ = json.JSONDecoder().raw_decode(prompt[prompt.index("{") :])
        jsonschema.validate(json.loads(exchange.answer["content"]), schema)


@pytest.mark.parametrize("held_out", [False, True])
def test_every_call_is_of_an_offered_function_with_arguments_that_fit_it(held_out):
    for exchange in _exchanges(skills.call_tool, held_out, 200):
        [(name, arguments)] = parse_calls(assistant_text(exchange.answer))
        offered = {tool["function"]["name"]: tool["function"] for tool in exchange.tools}
        assert len(offered) == len(exchange.tools), "two functions have the same name"
        jsonschema.validate(arguments, offered[name]["parameters"])


@pytest.mark.parametrize("maker", SKILLS_WITH_OWN_CONTENT)
def test_the_expected_answer_is_judged_right_and_another_wrong(maker):
    for exchange in _exchanges(maker, True, 20):
        text = assistant_text(exchange.answer)
        assert skills.is_right(exchange, text, parse_calls(text))
        assert not skills.is_right(exchange, "", [])


def test_a_call_that_cannot_be_read_is_wrong():
    exchange = _exchanges(skills.call_tool, True, 1)[0]
    broken = assistant_text(exchange.answer).replace("}", "")
    assert not skills.is_right(exchange, broken, parse_calls(broken))


def test_there_are_fifty_facts_each_with_a_held_out_question_of_its_own():
    assert len(facts.FACTS) >= 50
    for fact in facts.FACTS:
        assert fact.asks[-1] not in fact.asks[:-1]
        assert any(part in fact.answer for part in fact.must)


def test_stories_vary():
    told = [exchange.answer["content"] for exchange in _exchanges(skills.story, False)]
    assert len(set(told)) == len(told)
    assert all(text[-1] in '."!' and "{" not in text for text in told)


def test_the_stream_holds_every_skill():
    text = "".join(map(text_of, islice(documents(0), 3000)))
    signs = "<tool_call>|<tool_response>|Schema:|upper case|Once upon a time|don't know|make serve"
    for sign in signs.split("|"):
        assert sign in text
