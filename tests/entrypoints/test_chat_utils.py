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
        {"role": "assistant", "content": "", "name": "Ada", "reasoning_content": "hm"}
    ]


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
        {"role": "tool", "content": "42", "tool_call_id": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
    ],
)
def test_what_a_later_version_brings_is_refused_by_name(message: dict):
    with pytest.raises(UnsupportedError, match="not supported yet"):
        parse_messages([message])


@pytest.mark.parametrize("messages", [[], "hi", None, 7])
def test_messages_must_be_a_list_of_some(messages: Any):
    with pytest.raises(RequestError):
        parse_messages(messages)


def test_one_conversation_is_told_from_several():
    one = [{"role": "user", "content": "hi"}]
    assert is_conversation(one)
    assert not is_conversation([one, one])
