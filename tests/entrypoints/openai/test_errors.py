"""What clients see when something is wrong: one body, the right status, nothing of the inside."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest

from minivllm.entrypoints.openai import middleware
from minivllm.entrypoints.openai.errors import MAX_MESSAGE_CHARS
from minivllm.exceptions import EngineDeadError, EngineGenerateError, QueueFullError
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import MAX_MODEL_LEN, VOCAB_SIZE, ByteTokenizer, FakeEngine

JSON = {"content-type": "application/json"}


def error_of(response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return error


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt", "token ids"),
        ({"prompt": [1, -1]}, "prompt", "token ids"),
        ({"prompt": [True]}, "prompt", "token ids"),
        ({"prompt": {"a": 1}}, "prompt", "token ids"),
        ({"prompt": [[1], 2]}, "prompt", "prompt[1]"),
        ({"prompt": ["a"] * 1025}, "prompt", "1024"),
        ({"prompt": [99999]}, "prompt", "99999"),
        ({"prompt": [[1], [VOCAB_SIZE]]}, "prompt", str(VOCAB_SIZE)),
        ({"prompt": ["a", "x" * MAX_MODEL_LEN]}, "prompt", str(MAX_MODEL_LEN)),
        ({"prompt": [1] * MAX_MODEL_LEN}, "prompt", str(MAX_MODEL_LEN)),
        ({"prompt": "x" * MAX_MODEL_LEN}, "prompt", str(MAX_MODEL_LEN)),
        ({"prompt": "x" * MAX_MODEL_LEN * 300}, "prompt", "characters"),
        ({"max_tokens": 1000}, "max_tokens", "max_tokens=1000"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"temperature": 3}, "temperature", "3"),
        ({"temperature": 0, "n": 2}, "n", "greedy"),
        ({"top_p": 0}, "top_p", "0"),
        ({"n": 0}, "n", "0"),
        ({"n": 20000}, "n", "16384"),
        ({"n": 16384, "prompt": ["a", "b"]}, "n", "16384"),
        ({"seed": 2**70}, "seed", None),
        ({"stop": ["a"] * 5}, "stop", "4"),
        ({"stop": ""}, None, None),
        ({"stop_token_ids": [5000]}, "stop_token_ids", "5000"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "x"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "5000"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "empty"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logprobs": -2}, "logprobs", "-2"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "0"),
        ({"truncation_side": "middle"}, "truncation_side", "left"),
        ({"cache_salt": "a/b"}, "cache_salt", "1 to 128"),
        ({"request_id": "a\nb"}, "request_id", "printable"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens", "10"),
        ({"suffix": "end"}, "suffix", "not supported yet"),
        ({"best_of": 1, "n": 2}, "best_of", "less than n=2"),
        ({"best_of": 2, "stream": True}, "best_of", "stream"),
        ({"best_of": 2, "echo": True, "max_tokens": 0}, "best_of", "max_tokens=0"),
        ({"best_of": 2, "temperature": 0}, "n", "greedy"),
        ({"guided_json": {"contains": {}}}, "structured_outputs", "contains"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "structured_outputs", "exactly one"),
        ({"guided_regex": "a", "structured_outputs": [None]}, "structured_outputs", "dictionary"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "regexp"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a"}, "use_beam_search": True}, "structured_outputs", "use_beam_search"),
        ({"response_format": {"type": "json_object"}, "use_beam_search": True}, "response_format", "use_beam_search"),
        ({"use_beam_search": True, "stream": True}, "stream", "use_beam_search"),
        ({"use_beam_search": True, "stop": ["x"]}, "stop", "use_beam_search"),
        ({"use_beam_search": True, "top_p": 0.5}, "top_p", "use_beam_search"),
        ({"use_beam_search": True, "echo": True, "logprobs": 1}, "echo", "use_beam_search"),
        ({"use_beam_search": True, "n": 11}, "beam_width", "20"),
        ({"use_beam_search": True, "n": 2, "logprobs": 5}, "logprobs", "4"),
        ({"use_beam_search": True, "length_penalty": 11}, "length_penalty", "11"),
        ({"use_beam_search": True, "prompt": "x" * MAX_MODEL_LEN}, "prompt", str(MAX_MODEL_LEN)),
        ({"length_penalty": 2}, "length_penalty", "needs use_beam_search"),
        ({"kv_transfer_params": {}}, "kv_transfer_params", "not supported yet"),
        ({"thinking_token_budget": 5}, "thinking_token_budget", "--reasoning-parser"),
        ({"bad_words": [" "]}, "bad_words", "empty"),
        ({"bad_words": ["x"] * 129}, "bad_words", "128"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids", "needs logprobs=1"),
        ({"logprob_token_ids": [1], "logprobs": 2}, "logprobs", "leave it out"),
        ({"logprob_token_ids": [9999], "logprobs": 1}, "logprob_token_ids", "9999"),
        ({"logprob_token_ids": [1], "logprobs": 1, "echo": True, "max_tokens": 0}, "logprob_token_ids", "answer"),
        ({"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection.min_count", "2"),
        ({"repetition_detection": {"pattern": 3}}, "repetition_detection", "pattern"),
        ({"vllm_xargs": {"a": 2**63}}, "vllm_xargs", "64 bit"),
    ],
)
def test_a_wrong_field_is_refused_by_name(api: Api, change: dict, param: str | None, says: str | None):
    response = api.post("/v1/completions", {"prompt": "Hi", **change})
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "BadRequestError"
    if param:
        assert error["param"] == param
    assert (says or "") in error["message"]
    assert api.engine.calls == []


def test_a_field_of_the_wrong_type_is_a_validation_error(api: Api):
    error = error_of(api.post("/v1/completions", {"prompt": "Hi", "temperature": "hot", "n": [1]}))
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "n", 400)
    assert error["message"].startswith("2 validation errors:")
    assert "  temperature" in error["message"] and "'hot'" in error["message"]


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b'"x"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_a_400(api: Api, content: bytes):
    response = api.request("POST", "/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    error_of(response)


def test_where_a_body_is_no_json_is_a_place_and_no_field(api: Api):
    error = error_of(api.request("POST", "/v1/completions", content=b'{"prompt": "x"]', headers=JSON))
    assert error["param"] == "body" and "at character 14" in error["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_a_400(api: Api, content_type: str):
    headers = {"content-type": content_type}
    response = api.request("POST", "/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 400
    assert "application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", rb'{"prompt": "\ud800"}', "prompt"),
        ("/v1/completions", b'{"prompt": "\xed\xa0\x80"}', "prompt"),
        ("/v1/completions", rb'{"prompt": "x", "stop": "\udfff"}', "stop"),
        ("/v1/completions", rb'{"prompt": "x", "bad_words": ["a", "\udfff"]}', "bad_words[1]"),
        ("/v1/completions", rb'{"prompt": "x", "model": "\ud800"}', "model"),
        ("/v1/completions", rb'{"prompt": "x", "guided_choice": "\uD800"}', "guided_choice"),
        ("/v1/completions", rb'{"prompt": "x", "structured_outputs": {"\ud800": 1}}', "structured_outputs.?"),
        # What a response repeats of its request: the answer was generated, and then could not be encoded.
        ("/v1/responses", rb'{"input": "x", "metadata": {"a": "\ud83c"}}', "metadata.a"),
        ("/v1/responses", rb'{"input": "x", "tool_choice": "\ud83c"}', "tool_choice"),
        ("/v1/responses", rb'{"input": "x", "stream": true, "metadata": {"a": "\ud83c"}}', "metadata.a"),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_name_wherever_it_stands(api: Api, path: str, body: bytes, param: str):
    response = api.request("POST", path, content=body, headers=JSON)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param and "surrogate" in error["message"]
    assert api.engine.calls == []


def test_both_halves_of_a_surrogate_pair_are_a_character(api: Api):
    body = rb'{"prompt": "\ud83c\udf89", "echo": true, "max_tokens": 0}'
    response = api.request("POST", "/v1/completions", content=body, headers=JSON)
    assert response.json()["choices"][0]["text"] == "\U0001f389"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_an_unknown_model_is_a_404_that_names_those_there_are(api: Api, path: str):
    asked = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x", "tokens": [1]}
    body = {"model": "nobody", **asked}
    error = error_of(api.post(path, body))
    assert (error["code"], error["type"], error["param"]) == (404, "NotFoundError", "model")
    assert "`nobody`" in error["message"] and "`fake`" in error["message"]


def test_an_unknown_route_and_a_wrong_method_have_the_same_body(api: Api):
    assert error_of(api.get("/v1/nothing"))["code"] == 404
    response = api.get("/v1/completions")
    assert error_of(response)["code"] == 405
    assert response.headers["allow"] == "POST"


def test_a_request_that_fails_in_the_engine_is_a_500(api: Api):
    api.engine.fail_after, api.engine.failure = (
        0,
        EngineGenerateError("no such block at 0x7f0012345678 in /a/b/c.py"),
    )
    error = error_of(api.post("/v1/completions", {"prompt": "Hi"}))
    assert (error["code"], error["type"]) == (500, "InternalServerError")
    assert error["message"] == "no such block at … in …"


def test_an_unexpected_failure_is_a_500_that_says_nothing_of_the_inside(api: Api):
    api.engine.fail_after, api.engine.failure = 0, KeyError("secret")
    error = error_of(api.post("/v1/completions", {"prompt": "Hi"}))
    assert error["code"] == 500
    assert "secret" not in error["message"]


def test_an_answer_that_never_finished_is_an_error(api: Api):
    api.engine.ends_early = True
    assert error_of(api.post("/v1/completions", {"prompt": "Hi"}))["code"] == 500
    assert "error" in api.stream()[-1]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "failure", [EngineDeadError(), EngineGenerateError("one step failed"), ValueError("secret")]
)
def test_a_stream_that_fails_ends_with_one_error_event(api: Api, path: str, failure: Exception):
    api.engine.fail_after, api.engine.failure = 3, failure
    chunks = api.stream(path)
    assert chunks[-1]["error"]["code"] == 500
    assert "secret" not in chunks[-1]["error"]["message"]
    assert len(chunks) > 2


def test_a_stream_that_fails_before_its_first_chunk_is_a_status(api: Api):
    api.engine.fail_after, api.engine.failure = 0, EngineDeadError()
    assert error_of(api.post("/v1/completions", {"prompt": "Hi", "stream": True}))["code"] == 500


def test_one_prompt_that_fails_ends_the_others(api: Api):
    api.engine.fail_after, api.engine.failure = 3, EngineGenerateError("one step failed")
    assert "error" in api.stream(prompt=["a", "b", "c"])[-1]
    assert api.engine.num_open == 0


def test_a_dead_engine_is_not_healthy(api: Api, engine: FakeEngine):
    assert (api.get("/health").status_code, api.get("/health").content) == (200, b"")
    engine.dead_error = EngineDeadError()
    assert api.get("/health").status_code == 503
    assert api.get("/ping").status_code == api.post("/ping", None).status_code == 503


@pytest.mark.parametrize(
    ("prompts", "num_tokenized"),
    [
        (["a", "x" * MAX_MODEL_LEN * 300], 0),  # seen before any is tokenized
        (["a", [VOCAB_SIZE]], 0),
        (["a", [1] * MAX_MODEL_LEN], 0),
        (["x" * MAX_MODEL_LEN, *["a"] * 9], 1),  # seen once it is
    ],
)
def test_prompts_are_tokenized_no_further_than_to_the_first_that_does_not_fit(prompts: list, num_tokenized: int):
    class Counting(ByteTokenizer):
        num_tokenized = 0

        def encode(self, text: str, **options: Any) -> list[int]:
            self.num_tokenized += 1
            return super().encode(text, **options)

    tokenizer = Counting()
    api = Api(FakeEngine(tokenizer=tokenizer))
    assert error_of(api.post("/v1/completions", {"prompt": prompts}))["param"] == "prompt"
    assert tokenizer.num_tokenized == num_tokenized
    assert api.engine.calls == []


def test_token_ids_that_are_truncated_may_be_longer_than_the_context(api: Api):
    api.complete(prompt=[1] * 2 * MAX_MODEL_LEN, truncate_prompt_tokens=-1)


def test_prompts_that_fail_at_once_leave_no_unread_error(api: Api, caplog: pytest.LogCaptureFixture):
    api.engine.fail_after, api.engine.failure = 0, EngineGenerateError("no")
    assert error_of(api.post("/v1/completions", {"prompt": ["a"] * 20}))["code"] == 500
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_body_beyond_the_limit_is_refused_before_it_is_read(
    api: Api, monkeypatch: pytest.MonkeyPatch, path: str, announced: bool
):
    monkeypatch.setattr(middleware, "MAX_BODY_BYTES", 1000)
    num_sent = 0

    async def chunks():
        nonlocal num_sent
        for _ in range(100):
            num_sent += 1
            yield b" " * 100

    headers = {**JSON, "content-length": "10000"} if announced else JSON
    response = api.run(lambda client: client.post(path, content=chunks(), headers=headers))
    error = error_of(response)
    assert (error["code"], response.headers["connection"]) == (413, "close")
    assert "1000 bytes" in error["message"]
    assert num_sent == (0 if announced else 11)


def test_a_body_at_the_limit_is_taken(api: Api, monkeypatch: pytest.MonkeyPatch):
    content = json.dumps({"prompt": "Hi"}).encode()
    monkeypatch.setattr(middleware, "MAX_BODY_BYTES", len(content))
    assert api.request("POST", "/v1/completions", content=content, headers=JSON).status_code == 200


@pytest.mark.parametrize("name", ["self", "messages", "tokenize", "chat_template", "return_dict"])
def test_a_template_argument_that_is_not_the_clients_is_refused_by_name(api: Api, name: str):
    body = {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {name: 1}}
    for path in ("/v1/chat/completions", "/tokenize"):
        error = error_of(api.post(path, body))
        assert (error["code"], error["param"]) == (400, "chat_template_kwargs")
        assert name in error["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"logit_bias": {"x" * 10_000: "y"}},
        {"response_format": {"type": "text"}, "n": "x" * 10_000},
        {"messages": [{"role": "x" * 10_000, "content": "Hi"}]},
        {"request_id": "x" * 10_000},
    ],
)
def test_an_error_does_not_give_a_long_input_back(api: Api, change: dict):
    body = {"messages": [{"role": "user", "content": "Hi"}], **change}
    error = error_of(api.post("/v1/chat/completions", body))
    assert error["code"] == 400
    assert max(len(error["message"]), len(error["param"] or "")) <= MAX_MESSAGE_CHARS + 1
    response = api.request("PATCH", "/v1/models/" + "x" * 10_000)
    assert len(error_of(response)["message"]) <= MAX_MESSAGE_CHARS + 1


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_too_few_tokens_are_refused_under_the_name_they_were_asked_by(api: Api, name: str):
    body = {"messages": [{"role": "user", "content": "Hi"}], name: 0}
    error = error_of(api.post("/v1/chat/completions", body))
    assert (error["code"], error["param"]) == (400, name)
    assert name in error["message"]


def test_tokenize_takes_a_prompt_or_messages_but_not_both(api: Api):
    body = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}
    assert error_of(api.post("/tokenize", body))["code"] == 400
    assert api.post("/tokenize", {**body, "prompt": None}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["Hi", "Ho"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
def test_a_full_queue_is_a_503_that_says_when_to_come_back(api: Api, path: str, body: dict, stream: bool):
    api.engine.refuses = QueueFullError("the server is busy: 4 requests are open", reason="max_num_queued_reqs")
    response = api.post(path, {**body, "stream": stream})
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    error = error_of(response)
    assert (error["type"], error["param"]) == ("ServiceUnavailableError", None)
    assert "4 requests" in error["message"]
    assert api.engine.calls == []
