"""What each kind of constraint lets pass and what not, and what is refused with which words."""

from __future__ import annotations

import json

import pytest

from minivllm.exceptions import RequestError
from minivllm.sampling_params import MAX_GRAMMAR_CHARS, SamplingParams, StructuredOutputsParams
from minivllm.structured_output.grammar import GrammarError, to_grammar
from tests.structured_output.bytes import VOCABULARY, compiled, matches

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
}


@pytest.mark.parametrize(
    ("asked", "fits", "does_not"),
    [
        ({"regex": "[0-9]{3}-x/y"}, ["123-x/y"], ["12-x/y", "123-x/yz"]),
        ({"choice": ["red", "gr\"een\n", "", "blau é"]}, ["red", "gr\"een\n", "", "blau é"], ["redgr", "r", "x"]),
        ({"grammar": 'start: "a" start | "b"'}, ["b", "aab"], ["a", ""]),
        ({"grammar": 'root ::= "a" root | "b"'}, ["b", "aab"], ["a", ""]),
        ({"json_object": True}, ['{"a": [1, null]}', "{}"], ["[1]", "3", '{"a"}']),
        ({"json": {"enum": ["a", 1, None, {"b": 2}]}}, ['"a"', "1", "null", '{"b":2}'], ['"b"', "2"]),
        ({"json": "{}"}, ["1", '"x"', "[]"], ["x"]),
        (
            {"json": PERSON},
            ['{"name": "é", "age": 9}', '{"name":"x","age":150}'],
            ['{"age":9}', '{"name":"x","age":151}'],
        ),
        ({"json": json.dumps(PERSON)}, ['{"name": "", "age": 0, "more": []}'], ['{"name":"x","age":-1}']),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_whole_answer_must_match(asked: dict, fits: list[str], does_not: list[str]):
    params = StructuredOutputsParams(**asked)
    assert [text for text in fits if not matches(params, text)] == []
    assert [text for text in does_not if matches(params, text)] == []


SPACED = '{"name": "x", "age": 1}'
TIGHT = '{"name":"x","age":1}'


def test_whitespace_can_be_forbidden_or_given_a_pattern():
    assert matches(StructuredOutputsParams(json=PERSON), SPACED)
    tight = StructuredOutputsParams(json=PERSON, disable_any_whitespace=True)
    assert matches(tight, TIGHT) and not matches(tight, SPACED)
    one_space = StructuredOutputsParams(json=PERSON, whitespace_pattern="[ ]")
    assert matches(one_space, SPACED) and not matches(one_space, SPACED.replace(" ", "\n"))


def test_additional_properties_can_be_forbidden_everywhere_and_data_stays_data():
    schema = {
        "type": "object",
        "properties": {
            "properties": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            "c": {"const": {"properties": {}}},
        },
        "required": ["properties"],
    }
    closed = StructuredOutputsParams(json=schema, disable_additional_properties=True)
    assert matches(closed, '{"properties":{"a":1},"c":{"properties":{}}}')
    assert not matches(closed, '{"properties":{"a":1},"d":1}')
    assert not matches(closed, '{"properties":{"a":1,"b":1}}')
    assert matches(StructuredOutputsParams(json=schema), '{"properties":{"a":1,"b":1},"d":1}')


def test_properties_come_in_the_order_of_the_schema():
    schema = {"type": "object", "properties": {name: {"type": "null"} for name in "zab"}, "required": list("zab")}
    params = StructuredOutputsParams(json=schema)
    assert matches(params, '{"z":null,"a":null,"b":null}') and not matches(params, '{"a":null,"z":null,"b":null}')


# Structural tags


TAGS = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=one>", "schema": PERSON, "end": "</f>"},
        {"begin": "<f=two>", "schema": {"type": "integer"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("only text < f", True),
        ("so <f=two>3</f> and <f=one>" + TIGHT + "</f> then", True),
        ("so <f=two>x</f>", False),
        ("so <f=three>3</f>", False),
        ("so <f=two>3", False),
    ],
)
def test_behind_a_trigger_a_tag_must_follow(text: str, fits: bool):
    assert matches(StructuredOutputsParams(structural_tag=TAGS), text) is fits


def test_special_tokens_in_a_tag_are_tokens():
    tag = {
        "format": {
            "type": "triggered_tags",
            "triggers": ["<|call|>"],
            "tags": [{"begin": "<|call|>f:", "content": {"type": "json_schema", "json_schema": PERSON}, "end": "!"}],
            "at_least_one": True,
            "stop_after_first": True,
        }
    }
    params = StructuredOutputsParams(structural_tag=tag)
    assert matches(params, f"well <|call|>f:{TIGHT}!") and not matches(params, "well")
    assert not matches(params, f"<|call|>f:{TIGHT}! and")


def test_formats_combine():
    tag = {
        "format": {
            "type": "sequence",
            "elements": [
                {"type": "const_string", "value": "so "},
                {
                    "type": "tags_with_separator",
                    "separator": ", ",
                    "tags": [
                        {"begin": "a", "content": {"type": "regex", "pattern": "[0-9]/"}, "end": ";"},
                        {
                            "begin": "b",
                            "content": {
                                "type": "or",
                                "elements": [{"type": "const_string", "value": "x"}, {"type": "json_schema"}],
                            },
                            "end": ";",
                        },
                    ],
                    "at_least_one": True,
                },
            ],
        }
    }
    params = StructuredOutputsParams(structural_tag=json.dumps(tag))
    assert matches(params, "so a1/;, bx;, b[1];") and not matches(params, "so ") and not matches(params, "so a1/;, ")


@pytest.mark.parametrize(
    ("tag", "says"),
    [
        ({"format": {"type": "any_text"}}, "any_text' is not supported"),
        ({"structures": []}, "structures must be"),
        ({"structures": [{"begin": "x"}], "triggers": ["y"]}, "none of the triggers"),
        ({"structures": [{"begin": "x"}], "triggers": []}, "triggers must be"),
        ({"format": {"type": "const_string"}}, "value must be a string"),
        ({"type": "other"}, "other"),
        ({"format": {"type": "json_schema", "json_schema": []}}, "a schema must be"),
    ],
)
def test_a_tag_that_is_none_is_refused_by_name(tag: dict, says: str):
    with pytest.raises(GrammarError, match=says):
        to_grammar(StructuredOutputsParams(structural_tag=tag), VOCABULARY.special_ids)


# What is refused before anything is compiled


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "exactly one of .* got none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of .* got regex, choice"),
        ({"json": "{"}, "json is no valid JSON"),
        ({"json": "[]"}, "json must be a JSON object, got list"),
        ({"json": {"const": float("nan")}}, "no valid JSON"),
        ({"json": "[" * 100_000}, "no valid JSON"),
        ({"regex": ""}, "regex must be a string"),
        ({"regex": "a\0"}, "NUL"),
        ({"regex": "\ud800"}, "Unicode"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "262145 characters"),
        ({"choice": []}, "1 to 10000"),
        ({"choice": ["a" * 200_000] * 2}, "400000 characters"),
        ({"json_object": False}, "json_object must be true"),
        ({"grammar": " "}, "grammar must be"),
        ({"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True}, "exclude"),
    ],
)
def test_what_cannot_be_right_is_refused_at_once(asked: dict, says: str):
    with pytest.raises(RequestError, match=says) as caught:
        SamplingParams(structured_outputs=StructuredOutputsParams(**asked))
    assert caught.value.param == "structured_outputs"


def test_64_levels_of_schema_are_the_most():
    def nested(depth: int) -> dict:
        schema: dict = {}
        for _ in range(depth - 1):
            schema = {"not": schema}
        return schema

    StructuredOutputsParams(json=nested(64))
    with pytest.raises(RequestError, match="deeper than 64"):
        StructuredOutputsParams(json=nested(65))


def test_an_answer_that_is_complete_accepts_nothing_more():
    matcher = compiled(StructuredOutputsParams(regex="[0-9]{2}"))
    assert matcher.consume_tokens(list(b"12")) and matcher.is_stopped()
