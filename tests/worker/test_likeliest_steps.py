"""Steps of greedy requests choose tokens without keeping logits; others keep them; no answer tells which it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_random_model import make_model

from minivllm.messages.worker import GrammarOutput
from minivllm.models.decoder import DecoderForCausalLM
from minivllm.sampling_params import SamplingParams
from minivllm.worker.input_batch import InputBatch
from minivllm.worker.model_runner import ModelRunner
from tests.models.loop import Answer, Loop

VOCAB = 512
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
# What makes a step keep its logits: of its own rows, or (constraints, penalties) of any.
OTHERS = [
    {"temperature": 0.8},
    {"logprobs": 2},
    {"repetition_penalty": 1.3},
    {"logit_bias": {7: 3.0}},
    {"min_tokens": 3, "stop_token_ids": [5]},
    {"allowed_token_ids": [5, 6, 7]},
    {"temperature": 0.5, "top_k": 4},
]
PROMPTS = [[7 + (i * 13 + length) % 490 for i in range(length)] for length in (60, 3, 62, 33, 1, 12, 70, 5)]


class Counted:
    """How often a model was asked for logits, and for tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits = self.tokens = 0
        for name, counter in (("compute_logits", "logits"), ("likeliest", "tokens")):
            monkeypatch.setattr(DecoderForCausalLM, name, self._counting(getattr(DecoderForCausalLM, name), counter))

    def _counting(self, method, counter):
        def call(model, hidden):
            setattr(self, counter, getattr(self, counter) + 1)
            return method(model, hidden)

        return call


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    dtype = "bfloat16" if request.param == "int8" else request.param
    path = make_model(tmp_path_factory.mktemp("m"), arch="qwen3", dtype=dtype, vocab_size=VOCAB, seed=5)
    return path, {"quantization": "int8"} if request.param == "int8" else {}


def answers_with_logits(path: Path, *args, monkeypatch: pytest.MonkeyPatch, **kwargs) -> list[Answer]:
    """The same by a model that does not choose."""
    with monkeypatch.context() as patch:
        patch.setattr(DecoderForCausalLM, "can_choose", False)
        options = {name: kwargs.pop(name) for name in ("quantization",) if name in kwargs}
        return Loop(path, **options).run(*args, **kwargs)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_greedy_requests_are_answered_without_logits(model, counted: Counted, monkeypatch, enforce_eager: bool):
    path, options = model
    expected = answers_with_logits(path, PROMPTS, GREEDY, monkeypatch=monkeypatch, **options)
    counted.logits = counted.tokens = 0
    loop = Loop(path, enforce_eager=enforce_eager, **options)
    before = counted.logits  # the largest step was measured
    assert loop.run(PROMPTS, GREEDY) == expected
    assert counted.tokens > 0 and counted.logits == before


def test_a_batch_that_goes_from_one_way_to_the_other_and_back_gives_the_same_tokens(model, counted, monkeypatch):
    path, options = model
    # Greedy ones go on throughout; each of the others comes in among them, and is gone before the next.
    params = [GREEDY.clone(max_tokens=200)] * 3
    params += [SamplingParams(**{"temperature": 0, "max_tokens": 10, **other}) for other in OTHERS]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    expected = answers_with_logits(path, prompts, params, stagger=16, monkeypatch=monkeypatch, **options)
    counted.logits = counted.tokens = 0
    loop = Loop(path, **options)
    kinds: set[bool] = set()
    run_decode = ModelRunner._run_decode

    def noting(runner: ModelRunner, batch: InputBatch) -> None:
        run_decode(runner, batch)
        kinds.add(runner._decode.is_likeliest)

    monkeypatch.setattr(ModelRunner, "_run_decode", noting)
    assert loop.run(prompts, params, stagger=16) == expected
    assert kinds == {True, False} and counted.tokens and counted.logits  # of decodes; steps with prompts count as well
    for i in (0, 3, 4, 5):  # and of each request alone
        assert Loop(path, **options).run([prompts[i]], params[i], seeds=[i])[0].tokens == expected[i].tokens


def test_soft_caps_keep_their_logits(tmp_path: Path, counted: Counted):
    loop = Loop(make_model(tmp_path, arch="gemma2", num_layers=2, seed=3))
    loop.run(PROMPTS[:2], GREEDY)
    assert counted.tokens == 0 and counted.logits > 0


def test_a_model_that_changes_its_logits_is_asked_for_them(tiny_model: Path, counted: Counted):
    loop = Loop(tiny_model)
    model = loop.worker.runner.model
    whole = type(model)
    model.__class__ = type("Changed", (whole,), {"compute_logits": lambda self, x: -whole.compute_logits(self, x)})
    changed = loop.run(PROMPTS[:2], GREEDY)
    assert counted.tokens == 0 and changed != Loop(tiny_model).run(PROMPTS[:2], GREEDY)


class MaskedLoop(Loop):
    """Every step's sampling is given a mask that allows one token in eight, though nobody asked for it before."""

    def _step(self, answers: dict[str, Answer]) -> None:
        sample, mask = self.worker.sample_tokens, np.full(VOCAB // 32, 0x01010101, np.uint32)

        def masked(_: None):
            batch = self.worker.runner._batch
            if batch is None:
                return sample(None)
            return sample(GrammarOutput(batch.request_ids, np.tile(mask, len(batch.request_ids)).tobytes()))

        self.worker.sample_tokens = masked
        super()._step(answers)
        del self.worker.sample_tokens


def test_a_mask_that_comes_after_the_tokens_were_chosen_has_them_chosen_anew(model, counted, monkeypatch):
    path, options = model
    loop = MaskedLoop(path, **options)
    masked = loop.run(PROMPTS, GREEDY)
    assert counted.tokens > 0 and all(token % 8 == 0 for answer in masked for token in answer.tokens)
    monkeypatch.setattr(DecoderForCausalLM, "can_choose", False)
    assert MaskedLoop(path, **options).run(PROMPTS, GREEDY) == masked
