"""POST /v1/completions: shapes, fields, defaults."""

from __future__ import annotations

import pytest

from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import ANSWER, MAX_MODEL_LEN, FakeEngine, fake_logprob


def test_a_whole_completion_has_the_shape_of_the_api(api: Api):
    body = api.complete(max_tokens=100)
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "fake")
    assert body["system_fingerprint"].startswith("minivllm-")
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "text": ANSWER,
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    num_tokens = len(ANSWER.encode())
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": num_tokens,
        "total_tokens": 2 + num_tokens,
        "prompt_tokens_details": None,
    }


def test_without_max_tokens_a_completion_has_sixteen(api: Api):
    assert api.complete()["usage"]["completion_tokens"] == 16
    assert api.complete(max_tokens=None)["choices"][0]["finish_reason"] == "length"


def test_the_default_of_sixteen_gives_way_where_the_context_ends(api: Api):
    api.complete(prompt=[5] * (MAX_MODEL_LEN - 3))
    assert api.engine.calls[-1].params.max_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("ab", [[97, 98]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_every_form_of_prompt_reaches_the_engine_as_token_ids(api: Api, prompt, token_ids):
    body = api.complete(prompt=prompt)
    assert [call.prompt["prompt_token_ids"] for call in api.engine.calls] == token_ids
    assert [choice["index"] for choice in body["choices"]] == list(range(len(token_ids)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, token_ids))


def test_choices_are_numbered_prompt_by_prompt(api: Api):
    body = api.complete(prompt=["a", "b"], n=2, max_tokens=100)
    assert [(c["index"], c["text"][-1]) for c in body["choices"]] == [(0, "0"), (1, "1"), (2, "0"), (3, "1")]
    assert body["usage"]["completion_tokens"] == sum(len(c["text"].encode()) for c in body["choices"])


def test_a_stream_adds_up_to_the_whole(api: Api):
    ask = dict(prompt=["a", "b"], n=2, max_tokens=100)
    texts = ["", "", "", ""]
    reasons = {}
    for chunk in api.stream(**ask):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    whole = api.complete(**ask)["choices"]
    assert texts == [choice["text"] for choice in whole]
    assert reasons == {choice["index"]: choice["finish_reason"] for choice in whole}


def test_a_stream_sends_no_chunk_that_says_nothing(api: Api):
    # Every byte is a token, so most chunks of a multi-byte character have no text yet.
    assert all(choice["text"] for chunk in api.stream(max_tokens=100) for choice in chunk["choices"])


def test_usage_comes_last_and_only_when_asked(api: Api):
    plain = api.stream(max_tokens=5)
    assert all("usage" not in chunk for chunk in plain)
    asked = api.stream(max_tokens=5, stream_options={"include_usage": True})
    assert [chunk.get("usage") for chunk in asked[:-1]] == [None] * (len(asked) - 1)
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"] == api.complete(max_tokens=5)["usage"]


def test_continuous_usage_counts_up_in_every_chunk(api: Api):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = api.stream(max_tokens=4, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]


def test_usage_can_be_forced_by_the_server(engine: FakeEngine):
    assert (
        Api(engine, enable_force_include_usage=True).stream(max_tokens=2)[-1]["usage"]["completion_tokens"]
        == 2
    )


def test_logprobs_name_the_token_first_and_where_its_text_begins(api: Api):
    logprobs = api.complete(max_tokens=3, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["P", "a", "r"]
    assert logprobs["token_logprobs"] == [fake_logprob(ord(c)) for c in "Par"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][0] == {"P": fake_logprob(80), "\x00": 0.0, "\x01": -0.01}


def test_streamed_logprobs_are_those_of_the_whole(api: Api):
    for echo in (False, True):
        ask = dict(prompt="Hi!", max_tokens=6, logprobs=1, echo=echo)
        whole = api.complete(**ask)["choices"][0]["logprobs"]
        chunks = [chunk["choices"][0]["logprobs"] for chunk in api.stream(**ask)]
        assert {key: [x for c in chunks for x in c[key]] for key in whole} == whole


def test_tokens_can_be_shown_by_their_ids(api: Api, engine: FakeEngine):
    ask = dict(max_tokens=2, logprobs=0)
    assert api.complete(**ask, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["tokens"] == [
        "token_id:80",
        "token_id:97",
    ]
    server = Api(engine, return_tokens_as_token_ids=True)
    assert server.complete(**ask)["choices"][0]["logprobs"]["tokens"][0] == "token_id:80"


def test_an_infinite_logprob_is_a_number_json_can_say(api: Api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.entrypoints.openai.fakes.fake_logprob", lambda token: float("-inf"))
    assert api.complete(max_tokens=1, logprobs=1)["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_echo_gives_the_prompt_back_as_it_was_sent(api: Api):
    assert api.complete(prompt="Où ", echo=True, max_tokens=5)["choices"][0]["text"] == "Où Paris"
    assert api.complete(prompt=[72, 105], echo=True, max_tokens=5)["choices"][0]["text"] == "HiParis"


def test_echo_with_logprobs_has_those_of_the_prompt_too(api: Api):
    body = api.complete(prompt="Hi", echo=True, max_tokens=2, logprobs=1)
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "i", "P", "a"]
    assert logprobs["token_logprobs"] == [None, fake_logprob(105), fake_logprob(80), fake_logprob(97)]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert len(logprobs["tokens"]) == body["usage"]["total_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_generates_nothing(api: Api, stream: bool):
    ask = dict(prompt="Hi", echo=True, max_tokens=0, logprobs=0)
    if stream:
        *chunks, usage = api.stream(**ask, stream_options={"include_usage": True})
        (choice,) = [choice for chunk in chunks for choice in chunk["choices"]]
        body = {"choices": [choice], "usage": usage["usage"]}
    else:
        body = api.complete(**ask)
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("Hi", "length")
    assert body["choices"][0]["logprobs"]["tokens"] == ["H", "i"]
    assert body["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_come_with_the_choice(api: Api):
    (choice,) = api.complete(prompt="Hi", prompt_logprobs=1)["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["105"] == {"logprob": fake_logprob(105), "rank": 106, "decoded_token": "i"}


def test_token_ids_are_returned_when_asked(api: Api):
    ask = dict(prompt=["Hi", "x"], max_tokens=3, return_token_ids=True)
    whole = api.complete(**ask)["choices"]
    assert [c["prompt_token_ids"] for c in whole] == [[72, 105], [120]]
    assert [c["token_ids"] for c in whole] == [[80, 97, 114]] * 2
    streamed: dict[int, list[int]] = {0: [], 1: []}
    prompts = {}
    for chunk in api.stream(**ask):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["token_ids"]
            if "prompt_token_ids" in choice:
                assert choice["index"] not in prompts
                prompts[choice["index"]] = choice["prompt_token_ids"]
    assert streamed == {0: [80, 97, 114], 1: [80, 97, 114]}
    assert prompts == {0: [72, 105], 1: [120]}


def test_sampling_fields_reach_the_engine(api: Api):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.2,
        "stop": ["x", "y"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "allowed_token_ids": [1, 2],
        "logprobs": 4,
    }
    api.complete(**fields, logit_bias={"5": 500, "6": -1}, priority=3, cache_salt="salt", user="somebody")
    call = api.engine.calls[-1]
    assert {name: getattr(call.params, name) for name in fields} == fields
    assert call.params.logit_bias == {5: 100.0, 6: -1.0}
    assert call.prompt["cache_salt"] == "salt"
    assert call.priority == 3


def test_the_request_rules_over_the_model_over_the_defaults(api: Api):
    api.engine.default_sampling_params.update(temperature=0.6, top_k=20)
    api.complete(top_k=5)
    params = api.engine.calls[-1].params
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 5, 1.0)


def test_null_is_as_good_as_silence(api: Api):
    names = (
        "n",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "logit_bias",
        "logprobs",
        "stream_options",
        "user",
        "suffix",
    )
    api.complete(**{name: None for name in (*names, "presence_penalty", "stop_token_ids", "request_id")})
    silent = Api(FakeEngine())
    silent.complete()
    assert api.engine.calls[-1].params == silent.engine.calls[-1].params


def test_a_long_prompt_is_cut_when_asked(api: Api):
    api.complete(prompt="abcdef", truncate_prompt_tokens=2)
    assert api.engine.calls[-1].prompt["prompt_token_ids"] == list(b"ef")
    api.complete(prompt="abcdef", truncate_prompt_tokens=2, truncation_side="right")
    assert api.engine.calls[-1].prompt["prompt_token_ids"] == list(b"ab")
    api.complete(prompt=[1] * (MAX_MODEL_LEN + 50), truncate_prompt_tokens=-1, max_tokens=10)
    assert len(api.engine.calls[-1].prompt["prompt_token_ids"]) == MAX_MODEL_LEN - 10


def test_a_request_id_names_the_answer_and_the_engines_request(api: Api):
    assert api.complete(request_id="mine")["id"] == "cmpl-mine"
    response = api.post("/v1/completions", {"prompt": "a"}, headers={"X-Request-Id": "header"})
    assert response.json()["id"] == "cmpl-header"
    assert api.engine.calls[-1].request_id.startswith("cmpl-header")


def test_sampling_options_reach_the_engine(api: Api):
    api.complete(
        bad_words=["x"], logprobs=2, logprob_token_ids=[7, 9], vllm_xargs={"mine": [1]},
        spaces_between_special_tokens=False, repetition_detection={"max_pattern_size": 4, "min_count": 3},
    )  # fmt: skip
    params = api.engine.calls[-1].params
    assert (params.bad_words, params.logprob_token_ids, params.logprobs) == (["x"], [7, 9], 2)
    assert params.extra_args == {"mine": [1]} and not params.spaces_between_special_tokens
    assert params.repetition_detection.min_count == 3


def test_unknown_fields_are_ignored_and_harmless_values_of_later_ones_accepted(api: Api):
    api.complete(
        best_of=1, use_beam_search=False, response_format={"type": "text"}, bad_words=[], nonsense={"a": 1}
    )


def test_without_a_tokenizer_token_ids_are_served():
    api = Api(FakeEngine(skip_tokenizer_init=True))
    body = api.complete(prompt=[1, 2], max_tokens=2, logprobs=1, return_token_ids=True)
    assert body["choices"][0]["token_ids"] == [80, 97]
    assert api.post("/v1/completions", {"prompt": "text"}).status_code == 400


def test_a_beam_search_answers_best_first(api: Api):
    # The fake engine's likeliest tokens are 0, 1, 2, …, each a hundredth less likely than the one before.
    body = api.complete(prompt=["ab", "c"], use_beam_search=True, n=3, max_tokens=2, logprobs=1, return_token_ids=True)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [choice["token_ids"] for choice in body["choices"]] == [[0, 0], [0, 1], [1, 0]] * 2
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert body["choices"][2]["logprobs"]["token_logprobs"] == [-0.01, 0.0]
    assert body["choices"][2]["logprobs"]["top_logprobs"] == [{"\x01": -0.01, "\0": 0.0}, {"\0": 0.0}]
    assert body["usage"]["completion_tokens"] == 12
    assert len(api.engine.calls) == 2 * (1 + 3) and api.engine.calls[-1].params.logprobs == 6


class Scored(FakeEngine):
    """Answer i is the likelier, per token, the larger i is; even ones are twice as long."""

    def _answer(self, index, params):
        answer = super()._answer(index, params)
        answer.token_ids = [65 + index] * (4 if index % 2 == 0 else 2)
        answer.cumulative_logprob = (index - 10) * len(answer.token_ids)
        return answer


def test_best_of_gives_the_likeliest_per_token_and_counts_them_all():
    api = Api(Scored())
    body = api.complete(prompt=["a", "b"], n=2, best_of=4, return_token_ids=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["token_ids"] for choice in body["choices"]] == [[68, 68], [67] * 4] * 2
    assert body["usage"]["completion_tokens"] == 2 * (4 + 2 + 4 + 2)
    assert [choice["logprobs"] for choice in body["choices"]] == [None] * 4
    assert api.engine.calls[-1].params.n == 4
    refused = api.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "best_of": 4})
    assert refused.json()["error"]["param"] == "best_of"
