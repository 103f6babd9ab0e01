"""Equalities nobody can argue with, through the real server: a crowd never changes an answer."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from tests.e2e.server import Server, serving

NUM_STREAMS = 64


def mixed_requests(count: int = NUM_STREAMS) -> list[dict]:
    """Prompts of 1 to 300 tokens, 1 to 60 out, half greedy, half sampled with a seed; some share a prefix."""
    draw = random.Random(7)
    shared = [draw.randrange(300) for _ in range(160)]
    requests = []
    for i in range(count):
        prompt = [draw.randrange(300) for _ in range(draw.choice([1, 5, 33, 140, 300]))]
        request = {"prompt": shared + prompt[:100] if i % 4 == 0 else prompt, "max_tokens": draw.choice([1, 7, 60])}
        if i % 2:
            request |= {"temperature": 0.8, "seed": i, "top_p": 0.9, "frequency_penalty": 0.5}
        else:
            request |= {"temperature": 0}
        extra = {"ignore_eos": True, "return_token_ids": True, "priority": draw.randrange(-3, 3)}
        requests.append(request | {"extra_body": extra})
    return requests


async def stream_tokens(client: AsyncOpenAI, model: str, request: dict) -> list[int]:
    tokens: list[int] = []
    finished = 0
    async for chunk in await client.completions.create(model=model, stream=True, **request):
        for choice in chunk.choices:
            tokens += choice.token_ids or []
            finished += choice.finish_reason is not None
    assert finished == 1
    return tokens


async def crowd_and_alone(server: Server, model: str) -> tuple[list[list[int]], list[list[int]]]:
    requests = mixed_requests()
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        crowd = await asyncio.gather(*(stream_tokens(client, model, request) for request in requests))
        alone = [await stream_tokens(client, model, request) for request in requests]
    return list(crowd), alone


# A cache that holds only a few of the 64 at once, so that the crowd is preempted as well as batched.
TIGHT = ["--served-model-name", "tiny", "--max-model-len", "512"]
TIGHT += ["--block-size", "32", "--num-gpu-blocks-override", "96"]


# Every rule of the scheduler at once: small steps, shared by long prompts, in the order of priorities.
RULES = ["--scheduling-policy", "priority", "--no-scheduler-reserve-full-isl", "--watermark", "0.1"]
RULES += ["--max-num-batched-tokens", "96", "--max-num-seqs", "40", "--max-num-active-seqs", "30"]
RULES += ["--long-prefill-token-threshold", "50", "--prefix-caching-hash-algo", "xxhash"]


@pytest.mark.parametrize(
    "args",
    [
        ["--distributed-executor-backend", "uni"],
        ["--distributed-executor-backend", "ray"],
        ["--distributed-executor-backend", "uni", "--async-scheduling"],
        ["--distributed-executor-backend", "ray", "--async-scheduling"],
        [*RULES, "--async-scheduling"],
    ],
    ids=["uni", "ray", "uni-async", "ray-async", "rules"],
)
@pytest.mark.timeout(300)
def test_64_concurrent_streams_each_equal_the_same_request_alone(tiny_model: Path, short_path: Path, args: list[str]):
    with serving(tiny_model, *TIGHT, *args, run_dir=short_path) as server:
        crowd, alone = asyncio.run(crowd_and_alone(server, "tiny"))
    assert crowd == alone
    assert [len(tokens) for tokens in crowd] == [request["max_tokens"] for request in mixed_requests()]


def test_llm_gives_the_tokens_of_the_server(server: Server, tiny_model: Path):
    from minivllm import LLM, SamplingParams

    requests = mixed_requests(12)

    async def ask() -> list[list[int]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return list(await asyncio.gather(*(stream_tokens(client, "tiny", request) for request in requests)))

    params = [
        SamplingParams(ignore_eos=True, **{k: v for k, v in r.items() if k not in ("prompt", "extra_body")})
        for r in requests
    ]
    llm = LLM(str(tiny_model), max_model_len=1024, kv_cache_memory_bytes=64 << 20)
    try:
        outputs = llm.generate([r["prompt"] for r in requests], params, use_tqdm=False)
    finally:
        llm.shutdown()
    assert [output.outputs[0].token_ids for output in outputs] == asyncio.run(ask())


def test_a_beam_search_of_the_server_is_that_of_llm_and_reuses_what_beams_share(server: Server, tiny_model: Path):
    from minivllm import LLM, BeamSearchParams, SamplingParams

    prompt = [7 + i % 90 for i in range(300)]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "n": 4, "use_beam_search": True, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60).json()
    with LLM(str(tiny_model), max_model_len=1024, kv_cache_memory_bytes=64 << 20) as llm:
        (found,) = llm.beam_search(prompt, BeamSearchParams(beam_width=4, max_tokens=8, ignore_eos=True))
        (again,) = llm.generate(found.sequences[0].tokens, SamplingParams(max_tokens=1), use_tqdm=False)
    assert [choice["token_ids"] for choice in answer["choices"]] == [s.tokens[300:] for s in found.sequences]
    assert again.num_cached_tokens == 256  # two blocks of 128
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "n": 2, "use_beam_search": True}
    choices = httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
