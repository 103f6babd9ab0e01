"""Cut a request anywhere, send it to a fresh engine with what there was of its answer: the rest is the same.

The whole way, front end included: every delta, every logprob, the sums and the end, bit for bit. A cut after
token k means that the first k tokens, and the text they made, have been delivered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from make_random_model import make_model

from minivllm.engine import llm_engine, processor
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.parallel_sampling import ParentRequest
from minivllm.engine.processor import Prompt
from minivllm.exceptions import RequestError
from minivllm.messages.engine import EngineCoreRequest, LoRAIdentity
from minivllm.ops import native
from minivllm.ops.op import OpSpec
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.structured_output.checker import GrammarChecker
from minivllm.tokenizer.tokenizer import Tokenizer
from tests.engine.engines import make_config
from tests.models.loop import engine_config
from tests.properties.engine import PROCESSORS

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
PROMPT = list(range(40, 110))
UNAVAILABLE = native.why_not(OpSpec("cpu", torch.float32))
needs_kernels = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


class Engines:
    """Fresh engines of one model, each with its weights read anew and nothing in its cache.

    Every other one plans the next step while this one runs, so a request goes from either kind to either.
    """

    def __init__(self, model: Path | None) -> None:
        self._config = make_config()
        if model is not None:
            self._config = engine_config(
                model, num_gpu_blocks_override=64, logits_processors=PROCESSORS, enable_prompt_embeds=True
            )
        self._num_made = 0

    @property
    def hidden_size(self) -> int:
        return self._config.hf_config.hidden_size

    def fresh(self) -> LLMEngine:
        self._num_made += 1
        scheduling = replace(self._config.scheduler, async_scheduling=self._num_made % 2 == 0)
        return LLMEngine.from_engine_config(replace(self._config, scheduler=scheduling), in_process=True)

    def request(self, params: SamplingParams, prompt: Prompt = PROMPT) -> EngineCoreRequest:
        """As the front end makes it: with a seed, the tokens that end it, and the room there is."""
        return self.fresh().processor.process_inputs("r", prompt, params)[0]

    def run(self, request: EngineCoreRequest, prior_logprobs=None) -> list[RequestOutput]:
        engine, outputs = self.fresh(), []
        engine.add_request("r", request, request.sampling_params, prior_logprobs=prior_logprobs)
        while engine.has_unfinished_requests():
            outputs += engine.step()
        engine.shutdown()
        return outputs


def of_kind(request: EngineCoreRequest, kind: RequestOutputKind, prior: list[int]) -> EngineCoreRequest:
    params = request.sampling_params.clone(output_kind=kind)
    return msgspec.structs.replace(request, sampling_params=params, prior_output_token_ids=prior)


def shown(output: RequestOutput) -> tuple:
    """All that a user sees, times and cache hits apart."""
    return output.outputs, output.finished, output.prompt_logprobs, output.error


def check_every_cut(engines: Engines, request: EngineCoreRequest) -> list[RequestOutput]:
    """The deltas of the whole answer, once every cut has been compared with them."""
    deltas = engines.run(of_kind(request, DELTA, []))
    [whole] = engines.run(of_kind(request, FINAL_ONLY, []))
    token_ids, rows = whole.outputs[0].token_ids, whole.outputs[0].logprobs
    assert [len(delta.outputs[0].token_ids) for delta in deltas] == [1] * len(token_ids)
    for cut in range(len(token_ids) + 1):
        prior_logprobs = None if rows is None else rows[:cut]
        rest = engines.run(of_kind(request, DELTA, token_ids[:cut]), prior_logprobs)
        if cut < len(token_ids):
            assert [shown(delta) for delta in rest] == [shown(delta) for delta in deltas[cut:]], cut
        [final] = engines.run(of_kind(request, FINAL_ONLY, token_ids[:cut]), prior_logprobs)
        if cut == len(token_ids):  # nothing was left to compute: the prompt has not been scored again
            assert (rest[0].outputs[0].token_ids, rest[0].finished, len(rest)) == ([], True, 1)
            final = replace(final, prompt_logprobs=whole.prompt_logprobs)
        assert shown(final) == shown(whole), cut
    return deltas


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    model = make_model(tmp_path_factory.mktemp("model"), dtype="bfloat16", seed=3)
    tokenizer = Tokenizer.from_pretrained(str(model))  # holds no state of any request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_engine, "load_tokenizer", lambda config: tokenizer)
        checkers: list[GrammarChecker] = []  # one for all engines: it is a process
        make = processor.make_checker

        def make_once(*args):
            if not checkers:
                checkers.append(make(*args))
            return checkers[0]

        patch.setattr(processor, "make_checker", make_once)
        yield Engines(model)
        for checker in checkers:
            checker.close()


SEEDED = {"temperature": 0.9, "seed": 5}
PENALTIES = {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.3}
LOGPROBS = {"logprobs": 2, "prompt_logprobs": 1}


@needs_kernels
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0, **LOGPROBS},
        {"temperature": 0, **PENALTIES, "logprobs": 0},
        {**SEEDED, **PENALTIES, **LOGPROBS, "top_k": 60, "top_p": 0.95, "min_p": 0.001},
        {"temperature": 1.2, "logprobs": 1},
        {**SEEDED, "logit_bias": {77: 4.0, 78: 3.5}, "allowed_token_ids": list(range(60, 120))},
        {**SEEDED, "min_tokens": 9, "stop_token_ids": list(range(0, 512, 6)), **LOGPROBS},
        {
            **SEEDED,
            "min_tokens": 9,
            "stop_token_ids": list(range(0, 512, 6)),
            "include_stop_str_in_output": True,
        },
        {**SEEDED, "stream_interval": 1, "detokenize": False, "prompt_logprobs": 0},
        {**SEEDED, "structured_outputs": {"regex": "[a-zé]{4,9}-[0-9]{2}"}, "logprobs": 1, **PENALTIES},
        {**SEEDED, "structured_outputs": {"json_object": True}, "stop": ['":']},
        {**SEEDED, "extra_args": {"follow": 3}, "bad_words": ["a", "th", "1"], "logprobs": 1},
        {
            **SEEDED,
            "allowed_token_ids": list(range(60, 66)),
            "repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 2, "min_count": 2},
        },
    ],
    ids=lambda params: "-".join(params),
)
def test_a_resend_goes_on_with_the_same_answer(engines: Engines, params: dict[str, Any]):
    request = engines.request(SamplingParams(max_tokens=14, ignore_eos=True, **params))
    deltas = check_every_cut(engines, request)
    assert len({delta.outputs[0].token_ids[0] for delta in deltas if delta.outputs[0].token_ids}) > 3


@needs_kernels
def test_a_resend_of_vectors_goes_on_with_the_same_answer(engines: Engines):
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1, **SEEDED, **PENALTIES)
    vectors = torch.randn(70, engines.hidden_size, generator=torch.Generator().manual_seed(2))
    request = engines.request(params, {"prompt_embeds": vectors})
    deltas = check_every_cut(engines, request)
    assert deltas[0].prompt_token_ids is None and deltas[0].num_prompt_tokens == 70
    assert len({delta.outputs[0].token_ids[0] for delta in deltas}) > 3
    torn = msgspec.structs.replace(request, prompt_token_ids=[0] * 69)
    with pytest.raises(RequestError, match="70 zeros"):
        engines.fresh().add_request("r", torn, torn.sampling_params)


def test_a_resend_with_an_adapter_is_refused():
    engine, params = Engines(None).fresh(), SamplingParams()
    request = EngineCoreRequest("x", [1, 2], params, seed=0, lora=LoRAIdentity("sql", "1"))
    with pytest.raises(RequestError, match="adapter"):
        engine.add_request("x", request, params)


@needs_kernels
@pytest.mark.parametrize("include", [False, True], ids=["without-the-stop", "with-it"])
def test_a_resend_in_the_middle_of_a_stop_string_still_stops_there(engines: Engines, include: bool):
    free = SamplingParams(max_tokens=16, ignore_eos=True, **SEEDED)
    deltas = engines.run(of_kind(engines.request(free), DELTA, []))
    pieces = [delta.outputs[0].text for delta in deltas]
    stop = pieces[8][-1:] + pieces[9] + pieces[10] + pieces[11][:1]  # begins and ends within tokens
    assert len(stop) >= 4 and stop not in "".join(pieces[:11])
    stopping = free.clone(stop=[stop, stop[1:] + "never"], include_stop_str_in_output=include, logprobs=1)
    ended = check_every_cut(engines, engines.request(stopping))
    assert (len(ended), ended[-1].outputs[0].stop_reason) == (12, stop)


@needs_kernels
def test_a_resend_in_the_middle_of_a_character_shows_it_whole(engines: Engines):
    tokenizer = engines.fresh().tokenizer
    token_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    allowed = [token_of[bytes([byte])] for byte in sorted(set("é😀你".encode()))]
    params = SamplingParams(max_tokens=40, ignore_eos=True, allowed_token_ids=allowed, temperature=2, seed=1)
    texts = [delta.outputs[0].text for delta in check_every_cut(engines, engines.request(params))]
    assert "" in texts and set("".join(texts)) > {"\ufffd"}  # some were completed, some were broken off


@needs_kernels
def test_each_of_n_answers_can_be_resent(engines: Engines):
    params = SamplingParams(n=3, max_tokens=8, ignore_eos=True, logprobs=1, **PENALTIES)
    request = engines.request(params)
    [together] = engines.run(of_kind(request, FINAL_ONLY, []))
    for child, expected in zip(ParentRequest(request).child_requests(), together.outputs):
        deltas = check_every_cut(engines, child)
        assert [delta.outputs[0].token_ids[0] for delta in deltas] == expected.token_ids


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0, **LOGPROBS},
        {**SEEDED, "min_tokens": 5, "stop_token_ids": list(range(0, 64, 8)), "logprobs": 0},
        {"temperature": 1, "prompt_logprobs": 0},
    ],
    ids=["greedy", "stop-tokens", "unseeded"],
)
def test_a_resend_of_a_fake_model_goes_on_too(params: dict[str, Any]):
    engines = Engines(None)
    check_every_cut(engines, engines.request(SamplingParams(max_tokens=30, **params), PROMPT[:20]))


def test_a_resend_without_the_prior_logprobs_gives_those_of_the_rest():
    engines = Engines(None)
    request = engines.request(SamplingParams(max_tokens=6, logprobs=0, ignore_eos=True), [1, 2, 3])
    [whole] = engines.run(of_kind(request, FINAL_ONLY, []))
    answer = whole.outputs[0]
    [rest] = engines.run(of_kind(request, FINAL_ONLY, answer.token_ids[:2]))
    assert rest.outputs[0].token_ids == answer.token_ids
    assert rest.outputs[0].logprobs == answer.logprobs[2:]


def test_a_resend_that_does_not_fit_is_refused():
    engine = Engines(None).fresh()
    params = SamplingParams(n=2, max_tokens=4)
    request = EngineCoreRequest("x", [1, 2], params, seed=0, prior_output_token_ids=[3])
    with pytest.raises(RequestError, match="n=2"):
        engine.add_request("x", request, params)
    with pytest.raises(RequestError, match="differ"):
        engine.add_request("x", request, SamplingParams())
    params = SamplingParams(max_tokens=4)
    for prior, message in (([64], "vocabulary"), ([1] * 255, "2 and 255 tokens")):
        request = EngineCoreRequest("x", [1, 2], params, seed=0, prior_output_token_ids=prior)
        with pytest.raises(RequestError, match=message):
            engine.add_request("x", request, params)
    request = EngineCoreRequest("x", [1, 2], params, seed=0)
    engine.add_request("x", request, params)
    with pytest.raises(RequestError, match="in use"):
        engine.add_request("y", request, params)
    assert engine.has_unfinished_requests()  # the first one is still there
