"""Prompts as vectors through the real server, and through LLM: the answers of the tokens whose vectors they are."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from safetensors.torch import load_file

from minivllm import LLM, BeamSearchParams, SamplingParams, box_model_path
from minivllm.exceptions import RequestError
from minivllm.tokenizer.tokenizer import Tokenizer
from tests.e2e.server import Server, serving

TEXTS = ["The river", "Tell me a story about a fox.", "1 + 1 =", "Once " * 90]
PARAMS = {"max_tokens": 24, "temperature": 0.8, "seed": 3, "logprobs": 2}


@pytest.fixture(scope="module")
def prompts() -> list[tuple[list[int], torch.Tensor]]:
    """Token ids, and their rows of the table."""
    table = load_file(f"{box_model_path()}/model.safetensors")["model.embed_tokens.weight"]
    tokenizer = Tokenizer.from_pretrained(str(box_model_path()))
    ids = [tokenizer.encode(text) for text in TEXTS]
    return [(each, table[torch.tensor(each)]) for each in ids]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Small steps and few blocks: prompts come in chunks, and some requests are preempted.
    options = ["--enable-prompt-embeds", "--max-model-len", "512", "--block-size", "32", "--num-gpu-blocks-override"]
    options += ["24", "--max-num-batched-tokens", "64", "--max-num-seqs", "16"]
    with serving(None, *options, run_dir=tmp_path_factory.mktemp("run")) as server:
        yield server


def encoded(tensor: torch.Tensor) -> str:
    file = io.BytesIO()
    torch.save(tensor, file)
    return base64.b64encode(file.getvalue()).decode()


def shown(choice) -> tuple:
    return choice.text, choice.finish_reason, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs


def test_vectors_and_tokens_in_one_batch_streamed_and_whole(server: Server, prompts):
    async def talk() -> None:
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)

        async def whole(prompt, extra: dict) -> tuple:
            answer = await client.completions.create(model="minnow", prompt=prompt, extra_body=extra, **PARAMS)
            return shown(answer.choices[0])

        async def streamed(extra: dict) -> str:
            stream = await client.completions.create(
                model="minnow", prompt="", extra_body=extra, stream=True, **PARAMS
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        alone = [await whole(ids, {}) for ids, _ in prompts]
        salted = [
            {"prompt_embeds": encoded(vectors), "cache_salt": f"{i % 2}"} for i, (_, vectors) in enumerate(prompts)
        ]
        for _ in range(2):  # the second time from the cache
            together = await asyncio.gather(
                *(whole("", extra) for extra in salted),
                *(whole(ids, {}) for ids, _ in prompts),
                *(streamed(extra) for extra in salted),
            )
            assert together[:8] == alone * 2
            assert together[8:] == [answer[0] for answer in alone]
        both = await client.completions.create(
            model="minnow", prompt=prompts[0][0], extra_body={"prompt_embeds": [salted[1]["prompt_embeds"]]}, **PARAMS
        )
        assert [shown(choice) for choice in both.choices] == [alone[1], alone[0]]

    asyncio.run(talk())


def test_vectors_the_model_cannot_go_on_from_end_their_request_alone(server: Server, prompts):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    bad = torch.full((40, prompts[0][1].shape[1]), torch.finfo(torch.float32).max)
    before = client.completions.create(model="minnow", prompt=prompts[1][0], **PARAMS)
    with pytest.raises(openai.BadRequestError, match="with these prompt_embeds") as caught:
        client.completions.create(model="minnow", prompt="", extra_body={"prompt_embeds": encoded(bad)})
    assert caught.value.param == "prompt_embeds"
    after = client.completions.create(model="minnow", prompt=prompts[1][0], **PARAMS)
    assert shown(before.choices[0]) == shown(after.choices[0])


def test_llm_takes_tensors_beside_other_prompts(prompts):
    params = SamplingParams(n=2, max_tokens=16, seed=5, logprobs=1, frequency_penalty=0.5)
    given = [{"prompt_embeds": vectors} for _, vectors in prompts]
    with LLM(kv_cache_memory_bytes=64 << 20, enable_prompt_embeds=True) as llm:
        *of_vectors, text = llm.generate([*given, TEXTS[0]], params, use_tqdm=True)
        of_tokens = llm.generate([ids for ids, _ in prompts], params, use_tqdm=False)
        with pytest.raises(RequestError, match="beam search"):
            llm.beam_search(given[0], BeamSearchParams(beam_width=2, max_tokens=2))
    assert [output.outputs for output in of_vectors] == [output.outputs for output in of_tokens]
    assert text.outputs == of_tokens[0].outputs
    assert [output.prompt_token_ids for output in of_vectors] == [None] * len(prompts)
    assert [output.num_prompt_tokens for output in of_vectors] == [len(ids) for ids, _ in prompts]
    with LLM(kv_cache_memory_bytes=64 << 20) as llm, pytest.raises(RequestError, match="--enable-prompt-embeds"):
        llm.generate(given[0], params, use_tqdm=False)
