"""The template that ships renders what the model was trained on, and the tokenizer loses nothing."""

from __future__ import annotations

from random import Random

import pytest
from transformers import PreTrainedTokenizerFast

from examples.box_model import skills
from examples.box_model.chat import MARKERS, SPECIAL_TOKENS, assistant_text, parse_calls, segments
from examples.box_model.data import documents, text_of
from examples.box_model.tokenizer import save_tokenizer, train_tokenizer

AWKWARD = "Größe 你好 😀 e\u0301\n\n  x = 12345  \tI'll <im_end>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(1024, 1500, seed=0), path, max_length=2048)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("maker", skills.MIX)
def test_the_template_renders_what_was_trained_on(tokenizer, maker):
    for seed in range(5):
        exchange = maker(Random(seed), False)
        messages = [*exchange.messages, exchange.answer]
        rendered = tokenizer.apply_chat_template(messages, tools=exchange.tools, tokenize=False)
        assert rendered == "".join(text for text, _ in segments(messages, exchange.tools))


def test_a_system_message_stands_before_the_tools(tokenizer):
    exchange = skills.call_tool(Random(0), False)
    messages = [{"role": "system", "content": "Be kind."}, *exchange.messages]
    rendered = tokenizer.apply_chat_template(
        messages, tools=exchange.tools, tokenize=False, add_generation_prompt=True
    )
    assert rendered.startswith("<|im_start|>system\nBe kind.\nYou may call these functions:\n<tools>\n{")
    assert rendered.endswith("<|im_start|>assistant\n")
    assert rendered.removesuffix("<|im_start|>assistant\n") == "".join(
        text for text, _ in segments(messages, exchange.tools)
    )


def test_arguments_may_be_an_object_or_json_text(tokenizer):
    text = skills.calls("add", {"a": 1, "b": "é"})
    as_object = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}],
    }
    assert tokenizer.apply_chat_template([text], tokenize=False) == tokenizer.apply_chat_template(
        [as_object], tokenize=False
    )


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="unknown role: judge"):
        tokenizer.apply_chat_template([{"role": "judge", "content": "guilty"}], tokenize=False)


def test_calls_are_parsed_from_what_the_assistant_writes():
    message = skills.calls("add", {"a": 1})
    message["tool_calls"] += skills.calls("sub", {"b": "x"})["tool_calls"]
    assert parse_calls(assistant_text(message)) == [("add", {"a": 1}), ("sub", {"b": "x"})]
    assert parse_calls("<tool_call>\nnot json\n</tool_call>") == [("", None)]
    assert parse_calls("no call") == []


def test_any_text_comes_back_from_its_ids(tokenizer):
    texts = [AWKWARD, *(text_of(document) for _, document in zip(range(50), documents(3)))]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024")] == list("2024")


def test_markers_are_one_token_each_and_visible_while_turns_are_special(tokenizer):
    for marker in MARKERS:
        [token] = tokenizer.encode(marker)
        assert tokenizer.decode([token], skip_special_tokens=True) == marker
    for special in SPECIAL_TOKENS:
        [token] = tokenizer.encode(special)
        assert tokenizer.decode([token], skip_special_tokens=True) == ""


def test_a_conversation_in_pieces_has_the_ids_of_the_whole(tokenizer):
    for _, document in zip(range(100), documents(4)):
        whole = tokenizer.encode(text_of(document))
        assert whole == [token for text, _ in document for token in tokenizer.encode(text)]


def test_the_same_seed_trains_the_same_tokenizer(directory, tmp_path):
    save_tokenizer(train_tokenizer(1024, 1500, seed=0), tmp_path, max_length=2048)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_too_little_text_for_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="train on more documents"):
        train_tokenizer(4096, 5, seed=0)
