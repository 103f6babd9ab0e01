"""Tokens to text: no split character, no lost one, no more than a stop string allows, however tokens are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.engine.detokenizer import IncrementalDetokenizer
from minivllm.sampling_params import SamplingParams
from tests.engine.tokenizers import byte_level, sentencepiece, word_pieces

KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "other": word_pieces}
token_lists = st.lists(st.integers(0, 10_000), max_size=30)


def stream(tokenizer, ids, prompt=(), *, ends="length", **params) -> tuple[list[str], str | None]:
    """Feed one token at a time; the deltas, and the stop string found."""
    detokenizer = IncrementalDetokenizer(tokenizer, list(prompt), SamplingParams(**params))
    deltas = []
    for i, token in enumerate(ids):
        last = i == len(ids) - 1
        stop = detokenizer.update([token], ended_by_stop_token=last and ends == "stop", finished=last)
        deltas.append(detokenizer.next_text(finished=last or stop is not None, delta=True))
        if stop is not None:
            return deltas, stop
    return deltas, None


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_recognised(kind):
    assert KINDS[kind]().kind == kind


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("text", ["the fox", "größer 你好 🙂 end", " two  spaces ", "naïve the and, the."])
def test_our_decoding_is_the_librarys(kind, text):
    tokenizer = KINDS[kind]()
    if kind == "sentencepiece":
        text = text.strip()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.hf.decode(ids, clean_up_tokenization_spaces=False) == text


@settings(max_examples=200, deadline=None)
@given(ids=token_lists)
def test_byte_level_decoding_of_any_tokens_is_the_librarys(ids):
    tokenizer = byte_level()
    ids = [i % tokenizer.vocab_size for i in ids]
    for skip in (True, False):
        expected = tokenizer.hf.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(ids=token_lists)
def test_the_deltas_of_any_tokens_make_the_full_decode(kind, skip, ids):
    tokenizer = KINDS[kind]()
    ids = [i % tokenizer.vocab_size for i in ids]
    deltas, _ = stream(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(prompt=st.lists(st.integers(0, 10_000), min_size=1, max_size=12), ids=token_lists)
def test_the_deltas_continue_the_prompts_text(kind, prompt, ids):
    tokenizer = KINDS[kind]()
    prompt, ids = ([i % tokenizer.vocab_size for i in x] for x in (prompt, ids))
    deltas, _ = stream(tokenizer, ids, prompt)
    whole, head = tokenizer.decode(prompt + ids), tokenizer.decode(prompt)
    while head.endswith("\ufffd"):  # a character divided between prompt and answer belongs to the answer
        head = head[:-1]
    assert whole.startswith(head)
    assert whole.removeprefix(head).lstrip("\ufffd").endswith("".join(deltas).lstrip("\ufffd"))


def test_a_character_comes_whole_or_not_yet():
    tokenizer = byte_level()
    token_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [token_of[bytes([byte])] for byte in "🙂é".encode()]
    deltas, _ = stream(tokenizer, ids)
    assert deltas == ["", "", "", "🙂", "", "é"]


def test_an_unfinished_character_becomes_one_replacement_at_the_end():
    tokenizer = byte_level()
    token_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [token_of[bytes([byte])] for byte in "🙂".encode()[:3]]
    assert stream(tokenizer, ids)[0] == ["", "", "\ufffd"]


def test_a_sentencepiece_answer_keeps_its_leading_space_after_a_prompt():
    tokenizer = sentencepiece()
    ids = tokenizer.encode("the")
    assert stream(tokenizer, ids)[0] == ["the"]
    assert stream(tokenizer, ids, prompt=tokenizer.encode("and"))[0] == [" the"]


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abc ✓", max_size=20),
    stops=st.lists(st.text(alphabet="abc ✓", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_a_stop_string_cuts_exactly_wherever_tokens_end(text, stops, include):
    tokenizer = byte_level()
    deltas, stop = stream(tokenizer, tokenizer.encode(text), stop=stops, include_stop_str_in_output=include)
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not ends:
        assert (stop, "".join(deltas)) == (None, text)
        return
    assert stop in text
    # A token may hold more than one stop string's end; the first to be complete counts.
    assert text.find(stop) + len(stop) == min(ends)
    shown = text[: min(ends)] if include else text[: text.find(stop)]
    assert "".join(deltas) == shown


@pytest.mark.parametrize(("stops", "found"), [(["call", "tool"], "tool"), (["l>", "call>"], "call>")])
def test_of_two_stop_strings_in_one_token_the_first_to_end_or_the_longer_counts(stops, found):
    tokenizer = byte_level()
    deltas, stop = stream(tokenizer, [tokenizer.hf.convert_tokens_to_ids("<tool call>")], stop=stops)
    assert (stop, "".join(deltas)) == (found, "<tool call>".partition(found)[0])


def test_what_may_begin_a_stop_string_is_held_back():
    tokenizer = byte_level()
    detokenizer = IncrementalDetokenizer(tokenizer, [], SamplingParams(stop=["END"]))
    detokenizer.update(tokenizer.encode("abcEN"), ended_by_stop_token=False, finished=False)
    assert detokenizer.next_text(finished=False, delta=True) == "abc"
    detokenizer.update(tokenizer.encode("x"), ended_by_stop_token=False, finished=True)
    assert detokenizer.next_text(finished=True, delta=True) == "ENx"


def test_a_stop_string_within_min_tokens_does_not_stop():
    tokenizer = byte_level()
    ids = tokenizer.encode("stop stop")
    deltas, stop = stream(tokenizer, ids, stop=["stop"], min_tokens=len(ids), max_tokens=100)
    assert (stop, "".join(deltas)) == (None, "stop stop")


@pytest.mark.parametrize(("include", "text"), [(False, "the"), (True, "the.")])
def test_a_stop_tokens_text_is_left_out_unless_asked_for(include, text):
    tokenizer = byte_level()
    ids = [*tokenizer.encode("the"), *tokenizer.encode(".")]
    deltas, _ = stream(tokenizer, ids, ends="stop", include_stop_str_in_output=include)
    assert "".join(deltas) == text


def test_special_tokens_are_hidden_and_other_added_tokens_are_not():
    tokenizer = byte_level()
    end, tool = tokenizer.eos_token_id, tokenizer.hf.convert_tokens_to_ids("<tool call>")
    assert stream(tokenizer, [end, tool])[0] == ["", "<tool call>"]
    assert stream(tokenizer, [end, tool], skip_special_tokens=False)[0] == ["<|end|>", "<tool call>"]


def test_without_detokenize_there_is_no_text():
    detokenizer = IncrementalDetokenizer(byte_level(), [], SamplingParams(detokenize=False))
    detokenizer.update([1, 2, 3], ended_by_stop_token=False, finished=True)
    assert (detokenizer.token_ids, detokenizer.text) == ([1, 2, 3], "")


@pytest.mark.parametrize(
    ("spaces", "text"), [(True, "the <|end|> <|end|> <tool call> fox"), (False, "the <|end|><|end|><tool call> fox")]
)
def test_spaces_between_special_tokens_are_left_out_on_demand(spaces, text):
    tokenizer = word_pieces()
    end, tool = tokenizer.eos_token_id, tokenizer.hf.convert_tokens_to_ids("<tool call>")
    ids = [*tokenizer.encode("the"), end, end, tool, *tokenizer.encode("fox")]
    options = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces}
    assert "".join(stream(tokenizer, ids, **options)[0]) == text
