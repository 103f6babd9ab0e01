"""`prompt_embeds` of /v1/completions: prompts as tensors, which the server reads without torch."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
import torch

from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import MAX_MODEL_LEN, FakeEngine

HIDDEN = 8


def encoded(value: Any) -> str:
    file = io.BytesIO()
    torch.save(value, file)
    return base64.b64encode(file.getvalue()).decode()


def vectors(num_tokens: int, hidden: int = HIDDEN) -> torch.Tensor:
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(num_tokens))


@pytest.fixture
def api() -> Api:
    return Api(FakeEngine(enable_prompt_embeds=True))


@pytest.mark.parametrize("prompt", [None, "", []])
def test_vectors_stand_in_place_of_a_prompt(api: Api, prompt):
    body = api.complete(prompt=prompt, prompt_embeds=encoded(vectors(5)), max_tokens=3)
    assert body["usage"]["prompt_tokens"] == 5 and body["usage"]["completion_tokens"] == 3
    [call] = api.engine.calls
    assert call.prompt["prompt_embeds"].data() == vectors(5).numpy().tobytes()


def test_the_answers_to_vectors_come_first(api: Api):
    embeds = [encoded(vectors(5)), encoded(vectors(4)[None].bfloat16())]
    body = api.complete(prompt=["Hi", "Hello"], prompt_embeds=embeds, n=2, max_tokens=1, return_token_ids=True)
    assert body["usage"]["prompt_tokens"] == 5 + 4 + 2 + 5
    assert [choice["index"] for choice in body["choices"]] == list(range(8))
    prompts = [choice.get("prompt_token_ids") for choice in body["choices"]]
    assert prompts == [None] * 4 + [[72, 105]] * 2 + [list(b"Hello")] * 2


def test_a_stream_of_both(api: Api):
    chunks = api.stream(
        prompt="Hi", prompt_embeds=encoded(vectors(6)), max_tokens=2, stream_options={"include_usage": True}
    )
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}
    assert chunks[-1]["usage"]["prompt_tokens"] == 8


def test_a_salt_and_the_rest_of_sampling_go_along(api: Api):
    api.complete(prompt="", prompt_embeds=encoded(vectors(3)), cache_salt="s", frequency_penalty=1.0, logprobs=2)
    [call] = api.engine.calls
    assert call.prompt["cache_salt"] == "s" and call.params.frequency_penalty == 1.0


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"echo": True}, "echo", "tokens"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "tokens"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens", "tokens"),
        ({"use_beam_search": True}, "use_beam_search", "tokens"),
        ({"prompt_embeds": []}, "prompt_embeds", "list of 1"),
        ({"prompt_embeds": ""}, "prompt_embeds", "base64"),
        ({"prompt_embeds": [3]}, "prompt_embeds", "base64"),
        ({"prompt_embeds": {"a": 1}}, "prompt_embeds", "base64"),
        ({"prompt_embeds": "äöü"}, "prompt_embeds", "ASCII"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds", "torch.save"),
        ({"prompt_embeds": encoded({"a": 1})}, "prompt_embeds", "one dense tensor"),
        ({"prompt_embeds": encoded(vectors(5, 9))}, "prompt_embeds", "hidden size is 8"),
        ({"prompt_embeds": encoded(vectors(5).double())}, "prompt_embeds", "float64"),
        ({"prompt_embeds": encoded(vectors(4)[0])}, "prompt_embeds", "shape"),
        ({"prompt_embeds": encoded(vectors(MAX_MODEL_LEN))}, "prompt", str(MAX_MODEL_LEN)),
        ({"prompt_embeds": encoded(vectors(1).expand(1 << 30, -1))}, "prompt", str(1 << 30)),
        ({"prompt_embeds": encoded(vectors(5) * float("nan"))}, "prompt_embeds", "not finite"),
        ({"prompt_embeds": [encoded(vectors(5)), encoded(vectors(5, 9))]}, "prompt_embeds", "hidden size is 8"),
        ({"prompt_embeds": encoded(vectors(MAX_MODEL_LEN - 10)), "max_tokens": 11}, "max_tokens", "10"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_a_400_that_names_it(api: Api, change: dict, param: str, says: str, stream: bool):
    if stream and {"prompt_logprobs", "use_beam_search"} & change.keys():
        return  # a stream has neither, which is said first
    asked = {"prompt": "", "prompt_embeds": encoded(vectors(5)), "stream": stream, **change}
    response = api.post("/v1/completions", asked)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "BadRequestError") and says in error["message"], error


def test_a_server_that_was_not_asked_to_reads_none():
    api = Api(FakeEngine())
    response = api.post("/v1/completions", {"prompt": "", "prompt_embeds": "not even base64"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "prompt_embeds")
    assert "--enable-prompt-embeds" in error["message"]


def test_chat_has_none(api: Api):
    body = {"messages": [{"role": "user", "content": "x"}], "prompt_embeds": encoded(vectors(3))}
    assert api.post("/v1/chat/completions", body).json()["error"]["param"] == "prompt_embeds"
