"""The tables behind the options: every field says what it is, and no option is both ours and refused."""

from __future__ import annotations

from dataclasses import fields

import pytest

from minivllm.config.docs import field_docs, summary
from minivllm.config.frontend import FrontendConfig
from minivllm.config.not_yet import _NEUTRAL, ALIASES, NOT_YET, asks_for_nothing, words_to_ignore
from minivllm.engine.arg_utils import PARTS

CLASSES = [*PARTS.values(), FrontendConfig]


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_field_is_documented(config_class: type):
    assert set(field_docs(config_class)) == {field.name for field in fields(config_class)}
    assert summary(config_class).endswith(".")


def test_no_two_classes_share_a_field():
    names = [field.name for config_class in CLASSES for field in fields(config_class)]
    assert len(names) == len(set(names))


def test_an_option_is_ours_or_refused_never_both():
    ours = {field.name for config_class in CLASSES for field in fields(config_class)}
    assert ours & NOT_YET == set()
    assert set(ALIASES.values()) <= NOT_YET
    assert set(_NEUTRAL) <= NOT_YET


def test_a_value_that_asks_for_nothing_is_let_pass():
    assert asks_for_nothing("tensor_parallel_size", 1)
    assert asks_for_nothing("tensor_parallel_size", "1")
    assert asks_for_nothing("quantization", None)
    assert not asks_for_nothing("tensor_parallel_size", 2)
    assert not asks_for_nothing("quantization", "awq")


def test_on_a_command_line_only_the_words_of_the_option_are_ignored():
    assert words_to_ignore("tensor_parallel_size", "1") == 1
    assert words_to_ignore("no_enable_lora", "some/model") == 0
    assert words_to_ignore("disable_log_requests", "some/model") == 0
    assert words_to_ignore("enable_lora", None) is None
    assert words_to_ignore("tensor_parallel_size", "2") is None
