"""Messages in OpenAI's form become a role and a text, or an error that says which one is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from minivllm.entrypoints.chat_utils import is_conversation, parse_messages
from minivllm.exceptions import RequestError, UnsupportedError


def test_text_parts_are_joined_by_line_breaks():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a\nb"}]


def test_an_answer_of_ours_can_be_sent_back_as_it_came():
    answer = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": [], "function_call": None}
    assert parse_messages([answer]) == [{"role": "assistant", "content": "hi"}]


def test_what_a_template_may_want_is_passed_on():
    message = {"role": "assistant", "content": None, "name": "Ada", "reasoning_content": "hm"}
    assert parse_messages([message]) == [
        {"role": "assistant", "content": "", "name": "Ada", "reasoning": "hm", "reasoning_content": "hm"}
    ]


def test_a_call_and_its_answer_are_passed_on_with_the_arguments_as_an_object():
    function = {"name": "f", "arguments": '{"a": {"b": 1}}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": function}]}
    answer = {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "42"}]}
    assert parse_messages([call, answer]) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": {"b": 1}}}, "id": "x"}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "x"},
    ]


def test_templates_that_want_parts_get_parts():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    assert [m["content"] for m in parse_messages(messages, "openai")] == [[{"type": "text", "text": "a"}], []]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[1]"),
        ({"content": "hi"}, "messages[1].role"),
        ({"role": "pirate", "content": "hi"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": 7}, "messages[1].content"),
        ({"role": "user", "content": [7]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": "hi", "name": 7}, "messages[1].name"),
        ({"role": "tool", "content": None}, "messages[1].content"),
        ({"role": "tool", "content": "4", "tool_call_id": 4}, "messages[1].tool_call_id"),
        ({"role": "assistant", "tool_calls": {"id": "x"}}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "messages[1].tool_calls[0]"),
        ({"role": "user", "content": "hi", "tool_calls": [{}]}, "messages[1].tool_calls"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a'}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_wrong_message_is_named_by_its_place(message: Any, param: str):
    with pytest.raises(RequestError) as error:
        parse_messages([{"role": "system", "content": "s"}, message])
    assert error.value.param == param
    assert param in str(error.value)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "", "function_call": {"name": "f"}},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
    ],
)
def test_what_is_not_supported_is_refused_by_name(message: dict):
    with pytest.raises(UnsupportedError, match="not supported|takes no"):
        parse_messages([message])


@pytest.mark.parametrize("messages", [[], "hi", None, 7])
def test_messages_must_be_a_list_of_some(messages: Any):
    with pytest.raises(RequestError):
        parse_messages(messages)


def test_one_conversation_is_told_from_several():
    one = [{"role": "user", "content": "hi"}]
    assert is_conversation(one)
    assert not is_conversation([one, one])


def test_the_role_developer_is_system_to_a_template_that_does_not_know_it():
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]
    for template, role in {"{{ message.role }}": "system", "{% if role == 'developer' %}": "developer"}.items():
        assert [m["role"] for m in parse_messages(messages, template=template)] == [role, "user"]
    assert parse_messages(messages)[0]["role"] == "developer"
    assert messages[0]["role"] == "developer"
