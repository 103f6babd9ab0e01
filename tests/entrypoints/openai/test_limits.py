"""docs/server.md's table of limits is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from minivllm.config.frontend import FrontendConfig
from minivllm.entrypoints.openai import http_protocol, middleware, utils
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "server.md").read_text()
COMPLETE, CHAT, RESPOND = "/v1/completions", "/v1/chat/completions", "/v1/responses"
MESSAGES = "/v1/messages"
USER = {"role": "user", "content": "x"}


def rows(title: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    # A | within code is no border.
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def nested(levels: int) -> dict:
    value: dict = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def tool(name: str = "f") -> dict:
    return {"type": "function", "function": {"name": name}}


def schema(levels: int) -> dict:
    """properties in properties; each is two levels of JSON."""
    return {"structured_outputs": {"json": nested(levels)}}


def choice(count: int) -> dict:
    return {"structured_outputs": {"choice": [str(i) for i in range(count)]}}


# what the table calls it -> (number that the table gives, path, the body at this many, param of the error)
CASES: dict[str, tuple[int, str, Any, str | None]] = {
    "prompts of a completion": (1024, COMPLETE, lambda k: {"prompt": ["x"] * k, "max_tokens": 1}, "prompt"),
    "conversations of a batch": (1024, f"{CHAT}/batch", lambda k: {"messages": [[USER]] * k}, "messages"),
    "`messages` (`input` on `/v1/responses`)": (16_384, CHAT, lambda k: {"messages": [USER] * k}, "messages"),
    "parts of a message's `content`": (
        16_384, CHAT, lambda k: {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * k}]},
        "messages[0].content"),
    "`tools`": (1024, CHAT, lambda k: {"messages": [USER], "tools": [tool(f"f{i}") for i in range(k)],
                                      "tool_choice": "none"}, "tools"),
    "name of a function": (256, CHAT, lambda k: {"messages": [USER], "tools": [tool("f" * k)], "tool_choice": "none"},
                           "tools[0].function.name"),
    "`documents`": (1024, CHAT, lambda k: {"messages": [USER], "documents": [{}] * k}, "documents"),
    "`n`, and answers of all prompts together": (
        16_384, COMPLETE, lambda k: {"prompt": "x", "n": k, "temperature": 1, "max_tokens": 1}, "n"),
    "`stop`": (4, COMPLETE, lambda k: {"prompt": "x", "stop": ["a"] * k}, "stop"),
    "`stop_token_ids`": (4096, COMPLETE, lambda k: {"prompt": "x", "stop_token_ids": [*range(k)]}, "stop_token_ids"),
    "`bad_words`": (128, COMPLETE, lambda k: {"prompt": "x", "bad_words": ["a"] * k}, "bad_words"),
    "`logit_bias`": (16_384, COMPLETE, lambda k: {"prompt": "x", "logit_bias": {str(i): 1 for i in range(k)}},
                     "logit_bias"),
    "`allowed_token_ids`": (VOCAB_SIZE, COMPLETE, lambda k: {"prompt": "x", "allowed_token_ids": [7] * k},
                            "allowed_token_ids"),
    "`logprob_token_ids`": (128, COMPLETE, lambda k: {"prompt": "x", "logprobs": k, "logprob_token_ids": [*range(k)]},
                            "logprob_token_ids"),
    "`logprobs`, `top_logprobs`, `prompt_logprobs`": (20, COMPLETE, lambda k: {"prompt": "x", "logprobs": k},
                                                      "logprobs"),
    "a token id": (VOCAB_SIZE - 1, COMPLETE, lambda k: {"prompt": [k]}, "prompt"),
    "`repetition_detection.max_pattern_size`": (
        1024, COMPLETE, lambda k: {"prompt": "x", "repetition_detection": {"max_pattern_size": k, "min_count": 2}},
        "repetition_detection.max_pattern_size"),
    "`vllm_xargs`": (4096, COMPLETE, lambda k: {"prompt": "x", "vllm_xargs": {"a": [0] * (k - 2)}}, "vllm_xargs"),
    "a schema, regex or grammar": (
        262_144, COMPLETE, lambda k: {"prompt": "x", "structured_outputs": {"regex": "a" * k}}, "structured_outputs"),
    "a schema": (64, COMPLETE, lambda k: {"prompt": "x", "structured_outputs": {"json": nested(k)}},
                 "structured_outputs"),
    "`structured_outputs.choice`": (10_000, COMPLETE, lambda k: {"prompt": "x", **choice(k)}, "structured_outputs"),
    "`cache_salt`": (128, COMPLETE, lambda k: {"prompt": "x", "cache_salt": "s" * k}, "cache_salt"),
    "`request_id`": (256, COMPLETE, lambda k: {"prompt": "x", "request_id": "r" * k}, "request_id"),
    "`include` of `/v1/responses`": (
        64, RESPOND, lambda k: {"input": "x", "include": ["message.output_text.logprobs"] * k}, "include"),
    "`metadata` of `/v1/responses`": (
        65_536, RESPOND, lambda k: {"input": "x", "metadata": {"a": "x" * (k - len('{"a": ""}'))}}, "metadata"),
    "`tokens` of `/detokenize`": (1 << 20, "/detokenize", lambda k: {"tokens": [65] * k}, "tokens"),
    "`request_ids` of `/abort_requests`": (16_384, "/abort_requests", lambda k: {"request_ids": ["a"] * k},
                                           "request_ids"),
}  # fmt: skip
# Tested with their own: test_errors.py, test_flags.py.
ELSEWHERE = {
    "body": middleware.MAX_BODY_BYTES == 64 << 20,
    "JSON of a body": utils.MAX_JSON_DEPTH == 128,
    "head of a request": (FrontendConfig.h11_max_incomplete_event_size, FrontendConfig.h11_max_header_count)
    == (4 << 20, 256),
}


def test_every_limit_of_the_table_is_tested_and_no_other():
    assert [row[0] for row in rows("Limits")] == [*ELSEWHERE, *CASES]
    assert all(ELSEWHERE.values()) and hasattr(http_protocol, "HEAD_TIMEOUT_S")


@pytest.mark.parametrize("what", CASES)
def test_a_limit_is_the_one_of_the_table(engine: FakeEngine, what: str):
    """One more is a 400 that names the field. What is at the limit is not refused for it, though perhaps for more."""
    number, path, body, param = CASES[what]
    [told] = [row[1] for row in rows("Limits") if row[0] == what]
    if told[0].isdecimal():
        assert int(re.match(r"[\d,]+", told)[0].replace(",", "")) == number
    api = Api(engine, enable_dev_endpoints=True, api_key=None)
    error = api.post(path, body(number + 1)).json()["error"]
    assert (error["code"], error["param"]) == (400, param), error
    engine.refuses = None
    at_limit = api.post(path, body(number)) if number <= 4096 else None  # larger ones are slow, and no clearer
    if at_limit is not None and at_limit.status_code != 200 and path not in ("/abort_requests",):
        assert at_limit.json()["error"]["message"] != error["message"]
        assert str(MAX_MODEL_LEN) in at_limit.text or "vocabulary" in at_limit.text, at_limit.text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (RESPOND, lambda parts: {"input": [{"role": "user", "content": parts("input_text")}]}, "input[0].content"),
        (MESSAGES, lambda parts: {"messages": [{"role": "user", "content": parts("text")}]}, "messages[0].content"),
        (MESSAGES, lambda parts: {"messages": [USER], "system": parts("text")}, "system"),
    ],
)
def test_parts_are_counted_on_every_route_of_messages(api: Api, path: str, body: Any, param: str):
    many = body(lambda kind: [{"type": kind, "text": ""}] * 16_385)
    error = api.post(path, {"max_tokens": 1, **many} if path == MESSAGES else many)
    assert error.status_code == 400 and f"{param} holds 16385 parts" in error.text
