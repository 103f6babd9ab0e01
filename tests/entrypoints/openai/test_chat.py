"""POST /v1/chat/completions: shapes, fields, defaults."""

from __future__ import annotations

import json

import pytest

from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import ANSWER, MAX_MODEL_LEN, FakeEngine, fake_logprob

CHAT = "/v1/chat/completions"
PROMPT = "<user>Hi\n<assistant>"


def streamed(chunks: list[dict], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_a_whole_chat_completion_has_the_shape_of_the_api(api: Api):
    body = api.chat()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"], body["prompt_logprobs"]) == ("chat.completion", "fake", None)
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": ANSWER, "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert body["usage"]["prompt_tokens"] == len(PROMPT)
    assert api.engine.calls[-1].prompt["prompt_token_ids"] == list(PROMPT.encode())


def test_without_max_tokens_the_rest_of_the_context_is_free(api: Api):
    api.chat()
    assert api.engine.calls[-1].params.max_tokens == MAX_MODEL_LEN - len(PROMPT)


def test_max_completion_tokens_wins_over_the_older_name(api: Api):
    api.chat(max_tokens=9, max_completion_tokens=4)
    assert api.engine.calls[-1].params.max_tokens == 4


def test_the_models_own_limit_is_the_default(api: Api):
    api.engine.default_sampling_params["max_tokens"] = 7
    assert api.chat()["usage"]["completion_tokens"] == 7


def test_a_stream_opens_with_the_role_and_adds_up_to_the_whole(api: Api):
    chunks = api.stream(CHAT)
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert streamed(chunks) == ANSWER
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_n_streamed_answers_each_open_and_finish(api: Api):
    chunks = api.stream(CHAT, n=3)
    for index in range(3):
        assert chunks[index]["choices"][0]["delta"]["role"] == "assistant"
        assert streamed(chunks, index) == f"{ANSWER} {index}"


def test_usage_of_a_stream_is_that_of_the_whole(api: Api):
    chunks = api.stream(CHAT, n=2, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == api.chat(n=2)["usage"]
    assert chunks[-1]["usage"]["prompt_tokens"] == len(PROMPT)


def test_logprobs_have_bytes_and_the_likeliest_in_order(api: Api):
    (first, second) = api.chat(max_tokens=2, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"][
        "content"
    ]
    assert (first["token"], first["logprob"], first["bytes"]) == ("P", fake_logprob(80), [80])
    assert [top["bytes"] for top in second["top_logprobs"]] == [[0], [1]]
    assert [top["logprob"] for top in second["top_logprobs"]] == [0.0, -0.01]


def test_bytes_are_exact_inside_a_character(api: Api):
    api.engine.answer = "é"
    content = api.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "é"
    assert content[0]["top_logprobs"] == []


def test_streamed_logprobs_are_those_of_the_whole(api: Api):
    ask = dict(logprobs=True, top_logprobs=1, max_tokens=9)
    whole = api.chat(**ask)["choices"][0]["logprobs"]["content"]
    chunks = [chunk["choices"][0] for chunk in api.stream(CHAT, **ask)]
    assert [
        token for choice in chunks if choice["logprobs"] for token in choice["logprobs"]["content"]
    ] == whole


def test_parts_of_text_are_one_text(api: Api):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]
    api.chat(messages=[{"role": "user", "content": parts}])
    assert bytes(api.engine.calls[-1].prompt["prompt_token_ids"]) == b"<user>Hi\nyou\n<assistant>"


def test_the_last_message_is_continued_and_echoed(api: Api):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    ask = dict(
        messages=messages, add_generation_prompt=False, continue_final_message=True, echo=True, max_tokens=5
    )
    assert api.chat(**ask)["choices"][0]["message"]["content"] == "Well, Paris"
    assert streamed(api.stream(CHAT, **ask)) == "Well, Paris"


def test_the_role_is_the_servers_or_that_of_the_message_continued(engine: FakeEngine):
    api = Api(engine, response_role="bard")
    assert api.chat()["choices"][0]["message"]["role"] == "bard"
    assert api.chat(add_generation_prompt=False)["choices"][0]["message"]["role"] == "user"


def test_token_ids_are_returned_when_asked(api: Api):
    body = api.chat(max_tokens=2, return_token_ids=True)
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == (list(PROMPT.encode()), [80, 97])
    chunks = api.stream(CHAT, max_tokens=2, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == list(PROMPT.encode())
    assert [t for c in chunks for t in c["choices"][0].get("token_ids", [])] == [80, 97]


def test_prompt_logprobs_come_once(api: Api):
    rows = api.chat(prompt_logprobs=0)["prompt_logprobs"]
    assert len(rows) == len(PROMPT)
    assert rows[0] is None


def test_tools_that_may_not_be_used_are_accepted(api: Api):
    api.chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "clown", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"boom": True}}, "messages"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
        ),
        ({"max_completion_tokens": 1000}, "max_completion_tokens"),
        ({"documents": 7}, "documents"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_refused_by_name(api: Api, change: dict, param: str, stream: bool):
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream, **change}
    # httpx refuses to send half a surrogate pair; JSON can spell it.
    content, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    response = api.request("POST", CHAT, content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert api.engine.calls == []


def test_a_beam_search_answers_best_first(api: Api):
    body = api.chat(use_beam_search=True, n=2, max_tokens=1, logprobs=True, top_logprobs=2, return_token_ids=True)
    assert [choice["token_ids"] for choice in body["choices"]] == [[0], [1]]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["\0", "\x01"]
    (entry,) = body["choices"][1]["logprobs"]["content"]
    assert entry["logprob"] == -0.01 and [top["logprob"] for top in entry["top_logprobs"]] == [0.0, -0.01]


def test_logprobs_of_chosen_tokens_need_logprobs_and_no_number(api: Api):
    body = api.chat(max_tokens=1, logprobs=True, logprob_token_ids=[7, 9, 11])
    assert api.engine.calls[-1].params.logprobs == 3
    assert len(body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 4  # the fake's: its own and three
    messages = [{"role": "user", "content": "x"}]
    refused = api.post("/v1/chat/completions", {"messages": messages, "logprob_token_ids": [7]})
    assert refused.json()["error"]["param"] == "logprob_token_ids"


def test_the_servers_variables_reach_the_template_and_the_requests_win(engine: FakeEngine):
    seen: dict = {}
    original = engine.tokenizer.render_chat_template

    def render(messages: list, **options: object) -> str:
        seen.update(options)
        return original(messages, **options)

    engine.tokenizer.render_chat_template = render
    api = Api(engine, default_chat_template_kwargs={"a": 1, "b": 1})
    api.chat(chat_template_kwargs={"b": 2}, reasoning_effort="none", documents=[{"text": "d"}])
    assert (seen["a"], seen["b"], seen["reasoning_effort"], seen["enable_thinking"]) == (1, 2, "none", False)
    assert seen["documents"] == [{"text": "d"}]


def test_a_requests_own_template_needs_the_operators_trust(api: Api):
    ask = {"messages": [{"role": "user", "content": "Hi"}], "chat_template": "{{ 1 }}"}
    for path in (CHAT, "/tokenize"):
        response = api.post(path, ask)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template")
    seen: dict = {}
    api.engine.tokenizer.render_chat_template = lambda messages, **options: seen.update(options) or "x"
    Api(api.engine, trust_request_chat_template=True).chat(chat_template="{{ 1 }}")
    assert (seen["chat_template"], seen["trusted"]) == ("{{ 1 }}", False)


@pytest.mark.parametrize(("said", "content"), [("openai", [{"type": "text", "text": "Hi"}]), ("string", "Hi")])
def test_the_form_of_contents_can_be_said(engine: FakeEngine, said: str, content: object):
    seen: list = []
    engine.tokenizer.render_chat_template = lambda messages, **options: seen.extend(messages) or "x"
    Api(engine, chat_template_content_format=said).chat()
    assert seen[0]["content"] == content
