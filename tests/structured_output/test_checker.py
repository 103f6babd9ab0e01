"""Constraints that cannot be compiled: refused with the reason, in bounded time, at nobody else's cost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from minivllm.exceptions import EngineGenerateError, RequestError
from minivllm.sampling_params import StructuredOutputsParams
from minivllm.structured_output.checker import GrammarChecker
from tests.structured_output.bytes import VOCABULARY, matches


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(lambda: VOCABULARY)
    yield checker
    checker.close()


def refused(checker: GrammarChecker, **asked) -> str:
    with pytest.raises(RequestError) as caught:
        checker.grammar_of(StructuredOutputsParams(**asked))
    assert caught.value.param == asked.get("param", "structured_outputs")
    return str(caught.value)


def test_what_compiles_comes_back_as_a_grammar(checker: GrammarChecker):
    grammar = checker.grammar_of(StructuredOutputsParams(choice=["yes", "no"]))
    assert matches(grammar, "no") and not matches(grammar, "maybe")
    assert checker.why_not(grammar) is None
    assert "Empty" in checker.why_not("")


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"properties": {"a": {"dependentRequired": {}}}}, "dependentRequired"),
        ({"type": "string", "format": "postcode"}, "postcode"),
        ({"type": "strin"}, "strin"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "127.0.0.1"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
        ({"enum": []}, "anyOf is empty"),
        ({"minimum": 10**400}, "out of range"),
        ({"$ref": "#"}, "no text fits"),
    ],
)
def test_a_schema_that_cannot_be_done_names_the_keyword(checker: GrammarChecker, schema: dict, names: str):
    assert names in refused(checker, json=schema, param="response_format")


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": r"[^\s\S]"}, "no text fits"),
        ({"grammar": "start: start"}, "no text fits"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "root ::= ("}, "cannot read it"),
        ({"grammar": "start: <|nobody|>"}, "nobody"),
    ],
)
def test_so_do_expressions_and_grammars(checker: GrammarChecker, asked: dict, names: str):
    assert names in refused(checker, **asked)


ENDLESS = "start: A\nA: " + " & ".join(f"/(.|\\n)*a{i}(.|\\n)*/" for i in range(30))
DEEP = "start: r0\n" + "\n".join(f'r{i}: "a{i}" r{i + 1}' for i in range(8000)) + '\nr8000: "x"'
PARENTHESES = "start: " + "(" * 30_000 + '"a"' + ")" * 30_000
LARGE = {"enum": [f"value {i}" for i in range(16_000)]}


def test_a_catastrophic_one_is_refused_in_time_and_only_once(checker: GrammarChecker):
    assert "takes more than 5 s" in refused(checker, grammar=ENDLESS)
    assert checker._process is None
    assert "takes more than 5 s" in refused(checker, grammar=ENDLESS)
    assert checker._process is None  # from memory
    assert checker.grammar_of(StructuredOutputsParams(regex="[a-c]"))  # and the next has a process again


@pytest.mark.parametrize(
    "asked", [{"grammar": DEEP}, {"grammar": PARENTHESES}, {"regex": "(" * 100_000 + ")" * 100_000}]
)
def test_one_that_crashes_the_compiler_crashes_nothing_else(checker: GrammarChecker, asked: dict):
    assert "nested" in refused(checker, **asked) or "deep" in refused(checker, **asked)
    assert checker.grammar_of(StructuredOutputsParams(regex="[d-f]"))


@pytest.mark.parametrize(
    "asked", [{"json": LARGE}, {"regex": "a{1000000}"}, {"regex": "(a|b)*a(a|b){500}"}, {"grammar": "start: start"}]
)
def test_others_that_are_large_end_one_way_or_the_other(checker: GrammarChecker, asked: dict):
    with contextlib.suppress(RequestError):
        checker.grammar_of(StructuredOutputsParams(**asked))
    assert checker.grammar_of(StructuredOutputsParams(regex="[g-i]"))


def test_what_is_known_needs_no_process(checker: GrammarChecker):
    params = StructuredOutputsParams(regex="[x-z]{2}")
    assert not checker.knows(params)
    checker.grammar_of(params)
    checker.close()
    assert checker.knows(params) and checker.grammar_of(params)
    assert checker._process is None


def test_a_process_that_was_killed_by_somebody_else_is_not_the_constraints_fault(checker: GrammarChecker):
    checker.grammar_of(StructuredOutputsParams(regex="q{2}"))
    os.kill(checker._process.pid, signal.SIGKILL)
    with pytest.raises(EngineGenerateError, match="again"):
        checker.grammar_of(StructuredOutputsParams(regex="q{3}"))
    assert checker.grammar_of(StructuredOutputsParams(regex="q{3}"))


def test_many_threads_may_ask(checker: GrammarChecker):
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = checker.grammar_of(StructuredOutputsParams(regex=f"t{{{i % 5 + 1}}}"))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20 and len(set(found.values())) == 5
