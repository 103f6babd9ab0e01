"""Grammars followed token by token in the engine core."""

from __future__ import annotations

import random
import time
from collections import Counter

import llguidance
import numpy as np
import pytest

from minivllm.messages.engine import EngineCoreRequest
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams, ThinkingTokens
from minivllm.structured_output.grammar import to_grammar
from minivllm.structured_output.manager import GrammarManager, MatcherState, _CompiledCache
from tests.structured_output.bytes import EOS, TOKENIZER, VOCABULARY


@pytest.fixture
def manager():
    manager = GrammarManager(lambda: TOKENIZER)
    yield manager
    manager.shutdown()


def start(
    manager: GrammarManager, prior: bytes = b"", *, thinking: ThinkingTokens | None = None, **asked
) -> MatcherState:
    """One that is ready."""
    params = StructuredOutputsParams(**asked)
    grammar = to_grammar(params, VOCABULARY.special_ids) if asked.get("grammar") != "broken" else "start: nothing"
    request = EngineCoreRequest(
        "r", [1], SamplingParams(thinking=thinking), 0, grammar=grammar, prior_output_token_ids=list(prior)
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


def test_whose_fault_an_error_is(manager: GrammarManager):
    assert start(manager, grammar="broken").error_param == "structured_outputs"
    assert start(manager, b"ax", regex="ab+").error_param == "prior_output_token_ids"
    ours = start(manager, regex="ab+")
    ours.accept(ord("x"))
    assert ours.error and ours.error_param is None


def test_a_grammar_may_turn_out_to_take_too_much_as_it_is_followed(manager: GrammarManager):
    many = 6000
    grammar = "start: " + " | ".join(f"r{i}" for i in range(many)) + "\n"
    state = start(manager, grammar=grammar + "\n".join(f'r{i}: "a" "{i}"' for i in range(many)))
    state.accept(ord("a"))
    assert state.error_param == "structured_outputs"
    assert state.error.startswith("structured_outputs: the grammar cannot go on after 1 tokens: Current row has")


def test_a_mask_at_a_limit_allows_everything_and_the_token_it_allows_brings_the_error(
    manager: GrammarManager, monkeypatch: pytest.MonkeyPatch
):
    few = llguidance.LLParserLimits(max_lexer_states=300, verbose_errors=False)
    monkeypatch.setattr("minivllm.structured_output.manager.parser_limits", lambda: few)
    monkeypatch.setattr("minivllm.structured_output.manager._QUICK_S", 0)
    pick = random.Random(0)
    state = start(manager, regex="(a|b)*a(a|b){8}")
    mask = manager.bitmask([state])
    while state.error is None:
        state.accept(ord(pick.choice("ab")))
        if state.error is None:
            mask = manager.bitmask([state])
    assert set(mask) == {0xFF}
    assert "too many states" in state.error and state.error_param == "structured_outputs"


def test_requests_with_the_same_grammar_stand_where_each_of_them_does(manager: GrammarManager):
    states = [start(manager, regex="[a-c]{3}d") for _ in range(3)]
    for n, state in enumerate(states):
        for token in b"abc"[: n + 1]:
            state.accept(token)
    assert [allowed(manager, state) for state in states] == ["abc", "abc", "d"]


def test_a_grammar_is_compiled_once_and_again_where_many_use_it(
    manager: GrammarManager, monkeypatch: pytest.MonkeyPatch
):
    built = []
    build = manager._build
    monkeypatch.setattr(manager, "_build", lambda grammar: built.append(grammar) or build(grammar))
    manager._cache = _CompiledCache(most_lexers=2)
    states = [start(manager, regex="once") for _ in range(8)]
    assert len(built) == 1 and len({state.lexer for state in states if not state.error}) == 1
    states += [start(manager, regex="once") for _ in range(24)]
    assert len(built) == 2
    used = Counter(state.lexer for state in states if not state.error)
    assert len(used) == 2 and min(used.values()) >= 12


def test_however_many_use_them_no_more_lexers_are_kept_than_grammars_may_be(
    manager: GrammarManager, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("minivllm.structured_output.manager._MAX_CACHED", 3)
    manager._cache = cache = _CompiledCache(most_lexers=2)
    for grammar in ("a", "b", "c") * 2:
        for _ in range(20):
            assert not start(manager, regex=grammar).error
            assert sum(len(lexers) for lexers in cache._entries.values()) <= 3
    kept = [len(lexers) for lexers in cache._entries.values()]
    assert kept and sum(kept) == 3


def test_masks_made_on_several_threads_are_the_same(manager: GrammarManager, monkeypatch: pytest.MonkeyPatch):
    asked = [{"regex": "[a-c]+d"}, {"json_object": True}, {"choice": ["ab", "ac"]}]
    states = [start(manager, **asked[i % 3]) for i in range(24)]
    states.append(start(manager, thinking=ThinkingTokens([OPEN], CLOSE, is_open=True), regex="ab"))
    monkeypatch.setattr("minivllm.structured_output.manager._SLOW_S", 0.0)
    alone = manager.bitmask(states)
    assert manager._is_slow and manager._makers is None
    assert manager.bitmask(states) == alone and manager._makers is not None
    monkeypatch.setattr("minivllm.structured_output.manager._SLOW_S", 60.0)
    manager.bitmask(states)
    assert not manager._is_slow


# Behind thinking


OPEN, CLOSE = ord("("), [ord(";"), ord(")")]


def test_thinking_is_free_and_the_grammar_begins_behind_it(manager: GrammarManager):
    state = start(manager, thinking=ThinkingTokens([OPEN], CLOSE, is_open=True), regex="ab")
    for token in b"hm ( ) x;":
        assert not state.is_constraining and not state.is_complete
        state.accept(token)
    state.accept(ord(")"))
    assert state.is_constraining and allowed(manager, state) == "a"
    state.accept(ord("a"))
    state.accept(ord("b"))
    assert state.is_complete


def test_thinking_does_not_end_the_answer_that_must_have_a_form(manager: GrammarManager):
    marks = ThinkingTokens([OPEN], CLOSE, is_open=True, withheld=[EOS, ord("!")])
    state = start(manager, thinking=marks, regex="a?!")
    for token in b"hm;)":
        assert state.is_constraining
        bits = np.unpackbits(np.frombuffer(manager.bitmask([state]), np.uint8), bitorder="little")
        assert np.flatnonzero(bits == 0).tolist() == [ord("!"), EOS]
        state.accept(token)
    assert allowed(manager, state) == "!a"


def test_an_answer_may_open_thinking_instead_of_beginning_with_the_grammar(manager: GrammarManager):
    marks = ThinkingTokens([OPEN], CLOSE, is_open=False)
    answers, thinks = start(manager, thinking=marks, regex="ab"), start(manager, thinking=marks, regex="ab")
    assert allowed(manager, answers) == "(a"
    answers.accept(ord("a"))
    assert allowed(manager, answers) == "b"
    for token in b"(why;)":
        thinks.accept(token)
    assert allowed(manager, thinks) == "a"


def test_a_mark_of_several_tokens_opens_nothing(manager: GrammarManager):
    state = start(manager, thinking=ThinkingTokens([OPEN, OPEN], CLOSE, is_open=False), regex="ab")
    assert allowed(manager, state) == "a"


def test_a_resend_stands_at_the_same_place_of_thinking(manager: GrammarManager):
    marks, text = ThinkingTokens([OPEN], CLOSE, is_open=True), b"hm;)ab"
    whole = start(manager, thinking=marks, regex="abc")
    for i, token in enumerate(text):
        part = start(manager, text[:i], thinking=marks, regex="abc")
        assert part.is_constraining == whole.is_constraining
        if part.is_constraining:
            assert allowed(manager, part) == allowed(manager, whole)
        whole.accept(token)


def test_a_lexer_that_others_have_filled_is_replaced(manager: GrammarManager, monkeypatch: pytest.MonkeyPatch):
    few = llguidance.LLParserLimits(max_lexer_states=800, verbose_errors=False)
    monkeypatch.setattr("minivllm.structured_output.manager.parser_limits", lambda: few)
    monkeypatch.setattr("minivllm.structured_output.manager._QUICK_S", 60)
    built = []
    build = manager._build
    monkeypatch.setattr(manager, "_build", lambda grammar: built.append(grammar) or build(grammar))
    pick = random.Random(0)
    for _ in range(30):
        state = start(manager, regex="(a|b)*a(a|b){9}")
        for _ in range(40):
            assert allowed(manager, state).rstrip("$") == "ab"
            state.accept(ord(pick.choice("ab")))
        assert state.error is None
    assert 1 < len(built) < 30


def test_the_vocabulary_is_read_once_at_the_start_or_with_the_first_grammar():
    for preloads in (False, True):
        calls = []
        manager = GrammarManager(lambda calls=calls: calls.append(1) or TOKENIZER)
        if preloads:
            manager.preload()
        assert len(calls) == preloads
        for regex in ("a", "b"):
            start(manager, regex=regex)
        assert len(calls) == 1
        manager.shutdown()
