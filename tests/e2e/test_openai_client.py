"""The official client against the real server: what users do."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

MODEL = "tiny"
MESSAGES = [{"role": "user", "content": "Tell me about blocks of memory."}]


def test_models_lists_the_served_name(client: OpenAI):
    assert [card.id for card in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_streamed_chat_equals_the_whole_one(client: OpenAI):
    ask = dict(model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0)
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text and text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_a_streamed_completion_equals_the_whole_one(client: OpenAI):
    ask = dict(model=MODEL, prompt="Once upon a time", max_tokens=24, temperature=0.9, seed=5)
    whole = client.completions.create(**ask)
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True))
    assert text and text == whole.choices[0].text


def test_usage_comes_in_a_last_chunk_when_asked(client: OpenAI):
    ask = dict(model=MODEL, prompt="one two", max_tokens=7, temperature=0, extra_body={"ignore_eos": True})
    *_, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == client.completions.create(**ask).usage
    assert last.usage.completion_tokens == 7


@pytest.mark.parametrize("prompt", ["a text", ["two", "texts"], [5, 6, 7], [[5, 6], [7, 8, 9]]])
def test_every_form_of_prompt_is_served(client: OpenAI, prompt):
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3)
    expected = len(prompt) if isinstance(prompt[0], (list, str)) and not isinstance(prompt, str) else 1
    assert [choice.index for choice in answer.choices] == list(range(expected))


def test_n_answers_differ_and_a_seed_repeats_them(client: OpenAI):
    ask = dict(model=MODEL, prompt="dice", max_tokens=12, n=4, temperature=1.0, seed=11)
    first, second = (
        [c.text for c in sorted(client.completions.create(**ask).choices, key=lambda c: c.index)] for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 1


def test_a_stop_string_ends_the_answer_and_is_cut(client: OpenAI):
    ask = dict(model=MODEL, prompt="Once", max_tokens=40, temperature=0, extra_body={"ignore_eos": True})
    text = client.completions.create(**ask).choices[0].text
    stop = text[10:13]
    choice = client.completions.create(**ask, stop=[stop]).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_a_stop_token_ends_the_answer(client: OpenAI):
    body = {"ignore_eos": True, "return_token_ids": True}
    ask = dict(model=MODEL, prompt="Once", max_tokens=20, temperature=0)
    tokens = client.completions.create(**ask, extra_body=body).choices[0].token_ids
    stop = tokens[6]
    choice = client.completions.create(**ask, extra_body={**body, "stop_token_ids": [stop]}).choices[0]
    assert choice.token_ids == tokens[: tokens.index(stop) + 1]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_chat_logprobs_are_those_of_the_greedy_tokens(client: OpenAI):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    for token in answer.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0
        assert token.bytes


def test_echo_returns_the_prompt_and_its_logprobs(client: OpenAI):
    answer = client.completions.create(model=MODEL, prompt="hello world", max_tokens=2, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text.startswith("hello world")
    assert len(choice.logprobs.tokens) == answer.usage.total_tokens
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])


def test_penalties_change_a_greedy_answer(client: OpenAI):
    ask = dict(model=MODEL, prompt="again and again", max_tokens=40, temperature=0, extra_body={"ignore_eos": True})
    plain = client.completions.create(**ask).choices[0].text
    assert client.completions.create(**ask, frequency_penalty=2.0, presence_penalty=2.0).choices[0].text != plain


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "nobody"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"prompt": [10**6]}, openai.BadRequestError, "1000000"),
        ({"prompt": "word " * 2000}, openai.BadRequestError, "1024"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"extra_body": {"guided_json": {"uniqueItems": True}}}, openai.BadRequestError, "uniqueItems"),
    ],
)
def test_bad_input_is_refused_by_name_and_costs_nobody_else(client: OpenAI, change, error, names):
    ask = {"model": MODEL, "prompt": "x", "max_tokens": 4, **change}
    with pytest.raises(error) as caught:
        client.completions.create(**ask)
    assert names in str(caught.value)
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).choices[0].finish_reason
