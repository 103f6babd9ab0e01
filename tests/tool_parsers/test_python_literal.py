"""Literals as Python reads them, by hand."""

from __future__ import annotations

import ast
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.tool_parsers.abstract import Malformed
from minivllm.tool_parsers.python_literal import read_literal

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4)
    | st.tuples(inner)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def as_json_has_it(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [as_json_has_it(item) for item in value]
    if isinstance(value, dict):
        return {key: as_json_has_it(item) for key, item in value.items()}
    return value


@given(VALUES)
def test_what_python_writes_is_read_back(value: Any):
    assert read_literal(repr(value)) == as_json_has_it(value)


@given(st.text(alphabet="ab'\"\\\n{}[](),: 0e1.x_-", max_size=12))
def test_nothing_is_read_otherwise_than_python_reads_it(text: str):
    try:
        ours = read_literal(text)
    except Malformed:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            return  # we take a little more: line breaks in strings, for one
    assert ours == as_json_has_it(theirs)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("[null, None,]", [None, None]),
        ("'a' \"b\"", "ab"),
        ("'''a'b'''", "a'b"),
        (r"'\x41\u00e9\U0001F600\101\d'", "Aé😀A\\d"),
        ("(1)", 1),
        ("(1,)", [1]),
        ("1_000", 1000),
        ("-.5e1", -5.0),
    ],
)
def test_forms_that_repr_does_not_write(text: str, value: Any):
    assert read_literal(text) == value


@pytest.mark.parametrize(
    "text", ["", "f(1)", "a", "[1", "{1: 2}", "'a", "1 2", "0777", "1e999", "--1", "{'a' 1}", "[" * 100 + "]" * 100]
)
def test_what_is_no_literal_is_malformed(text: str):
    with pytest.raises(Malformed):
        read_literal(text)
