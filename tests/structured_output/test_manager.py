"""Grammars followed token by token in the engine core."""

from __future__ import annotations

import time

import numpy as np
import pytest

from minivllm.messages.engine import EngineCoreRequest
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams
from minivllm.structured_output.grammar import to_grammar
from minivllm.structured_output.manager import GrammarManager, MatcherState
from tests.structured_output.bytes import EOS, TOKENIZER, VOCABULARY


@pytest.fixture
def manager():
    manager = GrammarManager(lambda: TOKENIZER)
    yield manager
    manager.shutdown()


def start(manager: GrammarManager, prior: bytes = b"", **asked) -> MatcherState:
    """One that is ready."""
    params = StructuredOutputsParams(**asked)
    grammar = to_grammar(params, VOCABULARY.special_ids) if asked.get("grammar") != "broken" else "start: nothing"
    request = EngineCoreRequest(
        "r", [1], SamplingParams(), 0, grammar=grammar, prior_output_token_ids=list(prior)
    )
    state = manager.start(request)
    deadline = time.monotonic() + 30
    while not state.is_ready:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return state


def allowed(manager: GrammarManager, state: MatcherState) -> bytes | str:
    """The bytes that may come next, with $ for the end."""
    bits = np.unpackbits(np.frombuffer(manager.bitmask([state]), np.uint8), bitorder="little")
    ids = np.flatnonzero(bits).tolist()
    return "".join(chr(i) if i < 256 else {EOS: "$"}[i] for i in ids)


def test_the_end_is_allowed_exactly_where_the_grammar_accepts(manager: GrammarManager):
    state = start(manager, regex="ab?c?")
    seen = []
    for token in b"abc":
        seen.append(allowed(manager, state))
        assert not state.is_complete
        state.accept(token)
    assert seen == ["a", "bc$", "c$"] and state.is_complete


def test_prior_output_stands_where_following_it_would(manager: GrammarManager):
    asked = {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    text = b'{"a": 1234, "b": [true]}'
    whole = start(manager, **asked)
    for i, token in enumerate(text):
        assert manager.bitmask([start(manager, text[:i], **asked)]) == manager.bitmask([whole]), text[:i]
        whole.accept(token)
    assert start(manager, text, **asked).is_complete and whole.is_complete


def test_prior_output_that_does_not_fit_is_an_error(manager: GrammarManager):
    state = start(manager, b"ax", regex="ab+")
    assert "does not fit" in state.error and not state.is_constraining and not state.is_complete


def test_a_token_that_does_not_fit_is_an_error_once(manager: GrammarManager):
    state = start(manager, regex="ab+")
    state.accept(ord("x"))
    assert "120" in state.error
    state.accept(ord("a"))
    assert "120" in state.error


def test_what_does_not_compile_is_an_error(manager: GrammarManager):
    assert "could not be compiled" in start(manager, grammar="broken").error


def test_requests_with_the_same_grammar_stand_where_each_of_them_does(manager: GrammarManager):
    states = [start(manager, regex="[a-c]{3}d") for _ in range(3)]
    for n, state in enumerate(states):
        for token in b"abc"[: n + 1]:
            state.accept(token)
    assert [allowed(manager, state) for state in states] == ["abc", "abc", "d"]


def test_a_grammar_is_compiled_once(manager: GrammarManager, monkeypatch: pytest.MonkeyPatch):
    built = []
    build = manager._build
    monkeypatch.setattr(manager, "_build", lambda grammar: built.append(grammar) or build(grammar))
    for _ in range(10):
        start(manager, regex="once")
    assert len(built) == 1
