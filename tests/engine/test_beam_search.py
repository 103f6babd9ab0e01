"""Beam search against a search written from its definition, against transformers', and what happens when it is cut."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path

import pytest

from minivllm.engine.beam_search import BeamSearch, beam_search
from minivllm.exceptions import EngineGenerateError, RequestError
from minivllm.outputs import CompletionOutput, Logprob, RequestOutput
from minivllm.sampling_params import BeamSearchParams
from tests.engine.engines import VOCAB_SIZE
from tests.engine.test_processor import processor
from tests.entrypoints.openai.fakes import FakeEngine

EOS = 2
PROMPT = [5, 6, 7]


def logprobs_after(tokens: list[int], salt: int) -> list[float]:
    """A made-up model: some distribution over the vocabulary for each text, in which EOS is not rare."""
    draw = random.Random(str((salt, tokens)))
    weights = [draw.random() ** 6 for _ in range(VOCAB_SIZE)]
    weights[EOS] += 0.7 * max(weights)
    return [math.log(weight / sum(weights)) for weight in weights]


def answer(prompt: list[int], num_logprobs: int, salt: int) -> RequestOutput:
    """As the engine answers a request of one token: the likeliest token, then the likeliest."""
    row = logprobs_after(prompt, salt)
    likeliest = sorted(range(VOCAB_SIZE), key=lambda token: -row[token])[:num_logprobs]
    logprobs = {token: Logprob(row[token]) for token in likeliest}
    return RequestOutput("id", None, prompt, [CompletionOutput(0, "", likeliest[:1], None, [logprobs])], True)


def search(params: BeamSearchParams, salt: int) -> list[tuple[list[int], float]]:
    engine = processor(generation_config={"eos_token_id": EOS})
    running = BeamSearch(PROMPT, params, engine)
    while not running.finished:
        running.advance([answer(prompt, 2 * params.beam_width, salt) for prompt in running.prompts()])
    return [(beam.token_ids, beam.cum_logprob) for beam in running.best()]


def reference(params: BeamSearchParams, salt: int) -> list[tuple[list[int], float]]:
    """From the definition: all continuations of the open texts, scored, sorted, cut."""

    def score(text: tuple[list[int], float]) -> float:
        length = len(PROMPT) + len(text[0]) - (text[0][-1] == EOS and not params.ignore_eos)
        return text[1] / length**params.length_penalty

    open_texts: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[list[int], float]] = []
    for _ in range(params.max_tokens):
        longer = []
        for tokens, total in open_texts:
            row = logprobs_after(PROMPT + tokens, salt)
            limit = sorted(row)[-2 * params.beam_width]
            longer += [([*tokens, t], total + row[t]) for t in range(VOCAB_SIZE) if row[t] >= limit]
        if not params.ignore_eos:
            ended += [text for text in longer if text[0][-1] == EOS]
            longer = [text for text in longer if text[0][-1] != EOS]
        open_texts = sorted(longer, key=score)[: -params.beam_width - 1 : -1]
    return sorted(ended + open_texts, key=score)[: -params.beam_width - 1 : -1]


@pytest.mark.parametrize("salt", range(5))
@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("beam_width", [1, 2, 5])
def test_the_best_are_those_of_the_definition(beam_width: int, length_penalty: float, ignore_eos: bool, salt: int):
    params = BeamSearchParams(beam_width, 6, ignore_eos=ignore_eos, length_penalty=length_penalty)
    found, expected = search(params, salt), reference(params, salt)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [total for _, total in found] == pytest.approx([total for _, total in expected])


def test_a_search_ends_where_the_context_does():
    found = search(BeamSearchParams(2, 1000, ignore_eos=True), 0)
    assert [len(tokens) for tokens, _ in found] == [32 - len(PROMPT)] * 2


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 11}, "beam_width"),  # 22 logprobs, and --max-logprobs is 20
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"length_penalty": math.inf}, "length_penalty"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
def test_a_search_that_cannot_be_is_refused_by_name(options: dict, param: str):
    with pytest.raises(RequestError) as refused:
        BeamSearch(PROMPT, BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **options}), processor())
    assert refused.value.param == param


def test_a_beam_that_fails_fails_the_search():
    running = BeamSearch(PROMPT, BeamSearchParams(2, 4), processor())
    broken = answer(PROMPT, 4, 0)
    broken.error = "a step failed"
    with pytest.raises(EngineGenerateError, match="a step failed"):
        running.advance([broken])


def test_a_search_that_is_cancelled_leaves_no_request_running():
    async def cut() -> FakeEngine:
        engine = FakeEngine()
        task = asyncio.create_task(beam_search(engine, [1, 2], BeamSearchParams(3, 5), "id"))
        while len(engine.calls) < 4:
            await asyncio.sleep(0)
            if len(engine.calls) == 1:
                engine.go_on.set()
        engine.go_on.clear()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return engine

    engine = asyncio.run(cut())
    assert engine.num_open == 0 and len(engine.calls) < 1 + 4 * 3


@pytest.mark.parametrize("width", [1, 3])
def test_llm_finds_the_beams_of_transformers(tiny_model: Path, width: int):
    import torch
    from transformers import AutoModelForCausalLM

    from minivllm import LLM

    hf = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    hf.generation_config.eos_token_id = None
    prompts = [list(range(20, 20 + count)) for count in (3, 70, 41)]
    with LLM(str(tiny_model), max_model_len=256, kv_cache_memory_bytes=16 << 20) as llm:
        params = BeamSearchParams(beam_width=width, max_tokens=7, ignore_eos=True)
        outputs = llm.beam_search(prompts, params, concurrency_limit=2)
        text = llm.beam_search({"prompt": "the"}, params)[0].sequences[0]
    assert text.text.startswith("the") and text.finish_reason == "length" and len(text.logprobs) == 7
    for prompt, output in zip(prompts, outputs):
        with torch.inference_mode():
            expected = hf.generate(
                torch.tensor([prompt]), num_beams=width, num_return_sequences=width, max_new_tokens=7, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            scores = torch.log_softmax(hf(expected).logits, -1)
        assert [sequence.tokens for sequence in output.sequences] == expected.tolist()
        for sequence, score in zip(output.sequences, scores):
            steps = range(len(prompt) - 1, len(sequence.tokens) - 1)
            total = sum(score[i, sequence.tokens[i + 1]].item() for i in steps)
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-3)
