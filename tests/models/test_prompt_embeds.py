"""Prompts as vectors: answers are those to transformers' `inputs_embeds`, and to tokens whose vectors they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from make_random_model import make_model
from transformers import AutoModelForCausalLM

from minivllm.messages.engine import EngineCoreRequest, PromptEmbeds
from minivllm.ops import native
from minivllm.ops.recording import SizedRecording
from minivllm.sampling_params import SamplingParams
from tests.models.loop import Answer, Loop
from tests.models.test_parity import CASES, TIE, TOLERANCE

ARCHITECTURES = ["llama", "qwen3", "qwen2 with a window", "qwen3 in shards", "gemma2", "gemma3"]
NUM_TOKENS = 8


def make_embeds(vectors: torch.Tensor) -> PromptEmbeds:
    dtype = str(vectors.dtype).removeprefix("torch.")
    return PromptEmbeds(dtype, vectors.shape[1], vectors.contiguous().view(torch.uint8).numpy().tobytes())


def run(loop: Loop, *prompts: torch.Tensor | list[int], **params) -> list[Answer]:
    """Vectors and token ids together in one batch."""
    answers = {}
    for i, prompt in enumerate(prompts):
        embeds = None if isinstance(prompt, list) else make_embeds(prompt)
        token_ids = prompt if embeds is None else [0] * embeds.num_tokens
        asked = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2, **params)
        loop.scheduler.add_request(EngineCoreRequest(f"{i}", token_ids, asked, 0, prompt_embeds=embeds))
        answers[f"{i}"] = Answer()
    while loop.scheduler.has_requests():
        loop._step(answers)
    return list(answers.values())


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_model(tmp_path, seed=3, **CASES[request.param])


def test_random_vectors_are_continued_as_transformers_does(model: Path):
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(4)
    spread = hf.get_input_embeddings().weight.std().item()
    lengths = (70, 1, 33)
    prompts = [torch.randn(n, hf.config.hidden_size, generator=generator) * spread for n in lengths]
    for prompt, answer in zip(prompts, run(Loop(model), *prompts)):
        with torch.inference_mode():
            chosen = hf.get_input_embeddings()(torch.tensor(answer.tokens))
            inputs = torch.cat([prompt, chosen])[None]
            expected = torch.log_softmax(hf(inputs_embeds=inputs).logits[0].float(), -1)[len(prompt) - 1 : -1]
        for i, found in enumerate(answer.logprobs):
            best = expected[i].topk(2).values.tolist()
            assert expected[i, list(found)].tolist() == pytest.approx(best, abs=TIE, rel=0)
            assert list(found.values()) == pytest.approx(best, abs=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_vectors_of_tokens_give_the_answer_of_the_tokens_bit_for_bit(tmp_path: Path, dtype: str):
    """Beside each other in one batch, in chunks, and from the cache."""
    model = make_model(tmp_path, seed=3, arch="qwen3", dtype=dtype)
    loop = Loop(model, max_num_batched_tokens=48)
    pick = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 512, (n,), generator=pick).tolist() for n in (100, 1, 64, 33)]
    with torch.inference_mode():
        table = loop.worker.runner.model.embed_tokens(torch.arange(512))
    vectors = [table[torch.tensor(prompt)] for prompt in prompts]
    whole = run(Loop(model, enable_prefix_caching=False), *prompts)
    assert run(loop, *prompts[:2], *vectors) == [*whole[:2], *whole]
    again = run(loop, *vectors)
    assert again == whole and [answer.num_cached_tokens for answer in again] == [96, 0, 32, 32]
    # A vector's block is found by its bytes alone, never by the zeros that stand for its token.
    assert run(loop, [0] * 100)[0].num_cached_tokens == 0
    other = vectors[0].clone()
    other[40, 3] += 1
    assert run(loop, other)[0].num_cached_tokens == 32


@pytest.mark.skipif(native.unavailable is not None, reason="only native calls are recorded")
def test_steps_with_vectors_between_replayed_ones_change_no_bit_of_either(tmp_path: Path, monkeypatch):
    model = make_model(tmp_path, seed=3, arch="qwen3", dtype="bfloat16")
    loop, eager = Loop(model, max_num_batched_tokens=32), Loop(model, max_num_batched_tokens=32, enforce_eager=True)
    table = loop.worker.runner.model.embed_tokens(torch.arange(512))
    steps: list[str] = []
    replay, forward = SizedRecording.replay, type(loop.worker.runner.model).forward
    monkeypatch.setattr(SizedRecording, "replay", lambda self, sizes: steps.append("replayed") or replay(self, sizes))
    monkeypatch.setattr(
        type(loop.worker.runner.model), "forward", lambda self, *args: steps.append("eager") or forward(self, *args)
    )
    answers = []
    for each in (loop, eager):
        steps.clear()
        found = {"tokens": Answer(), "vectors": Answer()}
        asked = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
        each.scheduler.add_request(EngineCoreRequest("tokens", [5, 6, 7], asked, 0))
        for _ in range(4):
            each._step(found)
        embeds = make_embeds(table[100:150])
        each.scheduler.add_request(EngineCoreRequest("vectors", [0] * 50, asked, 0, prompt_embeds=embeds))
        while each.scheduler.has_requests():
            each._step(found)
        answers.append(found)
        if each is loop:
            taken = "".join(step[0] for step in steps)
    assert answers[0] == answers[1]
    assert "ree" + "r" * 5 in taken, taken  # fifty vectors beside a decode are two steps of 32


def test_a_prompt_of_vectors_has_no_tokens_to_repeat(tmp_path: Path):
    """Zeros stand where there are none: a penalty for repeating must not meet them."""
    model = make_model(tmp_path, seed=3)
    loop = Loop(model)
    table = loop.worker.runner.model.embed_tokens(torch.arange(512))
    vectors = table[torch.randint(1, 512, (40,), generator=torch.Generator().manual_seed(0))]
    favoured = {"logit_bias": {0: 100.0}, "repetition_penalty": 1e6}
    [answer] = run(loop, vectors, **favoured)
    assert answer.tokens[0] == 0 and 0 not in answer.tokens[1:]
    [answer] = run(loop, [5, 0, 7], **favoured)
    assert 0 not in answer.tokens


def test_vectors_that_overflow_fail_their_request_and_are_named(tmp_path: Path):
    loop = Loop(make_model(tmp_path, seed=3, dtype="bfloat16"))
    hidden_size = loop.config.hf_config.hidden_size
    plain = list(range(5, 50))
    [alone] = run(loop, plain)
    # Finite as it is given, and none in the model's own dtype.
    good, bad = run(loop, plain, torch.full((40, hidden_size), 3.4e38))
    assert bad.finish_reason == "error" and bad.error.startswith("with these prompt_embeds")
    assert (good.tokens, good.logprobs) == (alone.tokens, alone.logprobs)
