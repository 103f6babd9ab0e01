"""Constraints that leave no token: a 400 that names them, whenever that shows, and nobody else notices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai import OpenAI

from minivllm import LLM, SamplingParams
from tests.e2e.server import Server

MANY = 6000
WIDE = "start: " + " | ".join(f"r{i}" for i in range(MANY)) + "\n" + "\n".join(f'r{i}: "a" "{i}"' for i in range(MANY))


@pytest.fixture(scope="module")
def server(box_server: Server) -> Server:
    return box_server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def ids(server: Server) -> dict[str, int]:
    """Of texts that are a token each."""
    found = {}
    for text in ("a", "b", "<|im_end|>"):
        asked = {"prompt": text, "add_special_tokens": False}
        [found[text]] = httpx.post(f"{server.url}/tokenize", json=asked, timeout=60).json()["tokens"]
    return found


# What is asked, the fields that the error names, and how many tokens come before it.
CASES = {
    "at once": ({"regex": "b+"}, {"allowed_token_ids": ["a"]}, ["structured_outputs", "allowed_token_ids"], 0),
    "later": ({"regex": "a{60}b"}, {"allowed_token_ids": ["a"]}, ["structured_outputs", "allowed_token_ids"], 60),
    "words": ({"choice": ["a", "b"]}, {"bad_words": ["a", "b"]}, ["structured_outputs", "bad_words"], 0),
    "no end": (
        {"regex": "a{0,9}"},
        {"allowed_token_ids": ["<|im_end|>", "b"], "min_tokens": 3},
        ["structured_outputs", "allowed_token_ids", "min_tokens"],
        0,
    ),
    "too wide": ({"grammar": WIDE}, {}, ["structured_outputs"], None),
}


def ask(client: OpenAI, ids: dict[str, int], name: str, *, stream: bool) -> str:
    form, options, _, _ = CASES[name]
    extra = {"structured_outputs": form, **options}
    if "allowed_token_ids" in extra:
        extra["allowed_token_ids"] = [ids[text] for text in extra["allowed_token_ids"]]
    answer = client.completions.create(
        model="minnow", prompt="Say it:", max_tokens=80, temperature=1, seed=1, stream=stream, extra_body=extra
    )
    return "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text


@pytest.mark.parametrize("name", CASES)
def test_it_is_a_400_that_names_the_fields(client: OpenAI, ids: dict[str, int], name: str):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, ids, name, stream=False)
    _, _, fields, num_tokens = CASES[name]
    assert caught.value.param == fields[0]
    assert all(field in caught.value.message for field in fields), caught.value.message
    assert num_tokens is None or f"after {num_tokens} tokens" in caught.value.message


@pytest.mark.parametrize("name", CASES)
def test_a_stream_has_the_status_or_once_begun_an_event_of_the_same(server: Server, client, ids, name: str):
    form, options, fields, num_tokens = CASES[name]
    body = {
        "model": "minnow", "prompt": "Say it:", "max_tokens": 80, "stream": True, "structured_outputs": form, **options
    }  # fmt: skip
    if "allowed_token_ids" in body:
        body["allowed_token_ids"] = [ids[text] for text in body["allowed_token_ids"]]
    for _ in range(20 if num_tokens else 1):
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        if num_tokens and answer.status_code == 200:
            break
        # Nothing was sent yet: so it is at once, and later as well if the server got no processor between tokens.
        assert answer.status_code == 400 and answer.json()["error"]["param"] == fields[0]
    if not num_tokens:
        return
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert answer.status_code == 200 and len(events) >= 3 and events[-1] == "[DONE]"
    assert '"code":400' in events[-2] and all(field in events[-2] for field in fields), events[-2]
    with pytest.raises(openai.APIError):
        ask(client, ids, name, stream=True)


def test_the_field_has_the_name_that_the_client_gave_it(client: OpenAI, ids: dict[str, int]):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="minnow",
            messages=[{"role": "user", "content": "Hi"}],
            response_format={"type": "json_object"},
            extra_body={"allowed_token_ids": [ids["a"]]},
        )
    assert caught.value.param == "response_format" and "allowed_token_ids" in caught.value.message


def test_others_in_the_batch_go_on_unharmed(client: OpenAI, ids: dict[str, int]):
    def story(seed: int) -> tuple:
        asked = {"prompt": "Once", "max_tokens": 40, "seed": seed, "logprobs": 2}
        choice = client.completions.create(model="minnow", **asked).choices[0]
        return choice.text, choice.logprobs.token_logprobs

    def torn(name: str) -> int:
        try:
            ask(client, ids, name, stream=False)
        except openai.APIStatusError as error:
            return error.status_code
        return 200

    alone = [story(seed) for seed in range(4)]
    with ThreadPoolExecutor(16) as pool:
        stories = [pool.submit(story, seed) for seed in range(4)]
        statuses = [pool.submit(torn, name) for name in [*CASES] * 2]
        assert [future.result() for future in stories] == alone
        assert [future.result() for future in statuses] == [400] * 2 * len(CASES)


def test_of_prompts_given_to_llm_the_others_are_answered():
    with LLM(kv_cache_memory_bytes=64 << 20) as llm:
        b = llm.get_tokenizer().encode("b", add_special_tokens=False)
        torn = SamplingParams(allowed_token_ids=b, structured_outputs={"choice": ["a"]})
        bad, good = llm.generate(["x"] * 2, [torn, SamplingParams(max_tokens=4)], use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error" and "structured_outputs and allowed_token_ids" in bad.error
    assert good.error is None and len(good.outputs[0].token_ids) == 4
