"""What passes the processor cannot make a step fail; what does not is refused with the field's name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minivllm.config.reasoning import ReasoningConfig
from minivllm.config.structured_outputs import StructuredOutputsConfig
from minivllm.engine.parallel_sampling import child_seed
from minivllm.engine.processor import Processor, default_sampling_params
from minivllm.exceptions import RequestError
from minivllm.messages.engine import EngineCoreReady, PromptEmbeds
from minivllm.sampling_params import SamplingParams
from tests.engine.engines import VOCAB_SIZE, make_config
from tests.engine.tokenizers import byte_level

READY = EngineCoreReady(
    max_model_len=32, num_gpu_blocks=4, block_size=16, kv_cache_bytes=1, max_num_seqs=4, max_num_batched_tokens=64,
    dtype="fake", vocab_size=VOCAB_SIZE,
)  # fmt: skip


def processor(tokenizer=None, generation_config=None, **model) -> Processor:
    config = make_config(**model)
    if generation_config is not None:
        object.__setattr__(config, "generation_config", generation_config)
    return Processor(config, READY, tokenizer)


def process(prompt, processor_=None, **params):
    return (processor_ or processor()).process_inputs("id", prompt, SamplingParams(**params))[0]


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        (["a"], {}, "prompt"),
        ([1.5], {}, "prompt"),
        ([1] * 32, {}, "prompt"),
        ("text", {}, "prompt"),
        ({}, {}, "prompt"),
        ({"prompt_token_ids": "ab"}, {}, "prompt"),
        ({"prompt_token_ids": [1], "multi_modal_data": {}}, {}, "prompt"),
        ({"prompt_token_ids": [1], "cache_salt": ""}, {}, "cache_salt"),
        ({"prompt_token_ids": [1], "cache_salt": "a/b"}, {}, "cache_salt"),
        (3, {}, "prompt"),
        ([1], {"logprobs": 21}, "logprobs"),
        ([1], {"logprobs": -1}, "logprobs"),
        ([1], {"prompt_logprobs": 21}, "prompt_logprobs"),
        ([1], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ([1], {"allowed_token_ids": []}, "allowed_token_ids"),
        ([1], {"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
        ([1], {"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 2}, "allowed_token_ids"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([1], {"logit_bias": {1: float("nan")}}, "logit_bias"),
        ([1], {"logit_bias": {1: -1e31}}, "logit_bias"),
        ([1], {"stop_token_ids": list(range(VOCAB_SIZE)), "min_tokens": 1}, "min_tokens"),
        ([1], {"stop": ["x"]}, "stop"),
        ([1], {"bad_words": ["x"]}, "bad_words"),
        ([1], {"logprob_token_ids": [VOCAB_SIZE]}, "logprob_token_ids"),
        ([1], {"truncate_prompt_tokens": 32}, "truncate_prompt_tokens"),
        ([1] * 30, {"min_tokens": 5, "max_tokens": 5}, "min_tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(prompt, params, param):
    with pytest.raises(RequestError) as refused:
        process(prompt, **params)
    assert refused.value.param == param


def test_bad_words_and_what_is_allowed_may_leave_something():
    tokenizer = byte_level()
    config = make_config()
    object.__setattr__(config.hf_config, "vocab_size", tokenizer.vocab_size)
    some = Processor(config, READY, tokenizer)
    [q, z] = tokenizer.encode("qz", add_special_tokens=False)
    assert process([1], some, bad_words=["q"], allowed_token_ids=[q, z]).sampling_params.allowed_token_ids == [q, z]
    with pytest.raises(RequestError, match="bad_words forbids every token of allowed_token_ids") as refused:
        process([1], some, bad_words=["q", "z"], allowed_token_ids=[z, q, z])
    assert refused.value.param == "allowed_token_ids"
    with pytest.raises(RequestError, match="bad_words and min_tokens forbid every token of allowed_token_ids"):
        process([1], some, bad_words=["q"], allowed_token_ids=[q, z], stop_token_ids=[z], min_tokens=1)


def test_a_budget_for_thinking_needs_a_form_that_begins_behind_it():
    config = dataclasses.replace(
        make_config(),
        reasoning=ReasoningConfig(reasoning_parser="qwen3"),
        structured_outputs=StructuredOutputsConfig(structured_outputs_config={"enable_in_reasoning": True}),
    )
    with pytest.raises(RequestError, match="enable_in_reasoning") as refused:
        process(
            [1], Processor(config, READY, byte_level()), thinking_token_budget=3, structured_outputs={"regex": "a"}
        )
    assert refused.value.param == "thinking_token_budget"


def vectors(shape=(5, 8), dtype=torch.float32, value: float | None = None) -> torch.Tensor:
    made = torch.randn(shape).to(dtype)
    if value is not None:
        made[-1] = value
    return made


@pytest.mark.parametrize(
    ("prompt_embeds", "params", "param", "says"),
    [
        (vectors((5, 7)), {}, "prompt_embeds", "hidden size is 8"),
        (vectors((8,)), {}, "prompt_embeds", "shape"),
        (vectors((2, 3, 8)), {}, "prompt_embeds", "shape"),
        (vectors((0, 8)), {}, "prompt_embeds", "shape"),
        (vectors((32, 8)), {}, "prompt_embeds", "32 vectors"),
        (vectors((1, 8)).expand(1 << 35, -1), {}, "prompt_embeds", "vectors"),
        (vectors(dtype=torch.float64), {}, "prompt_embeds", "float64"),
        (vectors(dtype=torch.int32), {}, "prompt_embeds", "int32"),
        (vectors().to_sparse(), {}, "prompt_embeds", "dense"),
        (vectors(value=float("nan")), {}, "prompt_embeds", "not finite, at position 4"),
        (vectors(value=float("-inf"), dtype=torch.bfloat16), {}, "prompt_embeds", "not finite, at position 4"),
        (vectors(value=float("inf"), dtype=torch.float16), {}, "prompt_embeds", "not finite, at position 4"),
        (vectors(value=float("nan")).numpy(), {}, "prompt_embeds", "not finite"),
        ([[0.0] * 8], {}, "prompt_embeds", "tensor"),
        ("x", {}, "prompt_embeds", "tensor"),
        (vectors(), {"prompt_logprobs": 1}, "prompt_logprobs", "tokens"),
        (vectors(), {"prompt_logprob_token_ids": [[1]] * 4}, "prompt_logprob_token_ids", "tokens"),
        (vectors(), {"truncate_prompt_tokens": 2}, "truncate_prompt_tokens", "tokens"),
        (vectors(), {"max_tokens": 40, "min_tokens": 30}, "min_tokens", "room"),
        (PromptEmbeds("float32", 8, bytes(33)), {}, "prompt_embeds", "33 bytes"),
        (PromptEmbeds("float32", 8, b""), {}, "prompt_embeds", "0 bytes"),
        (PromptEmbeds("float8", 8, bytes(32)), {}, "prompt_embeds", "float8"),
        (PromptEmbeds("float32", 0, bytes(32)), {}, "prompt_embeds", "hidden size"),
    ],
)
def test_vectors_that_do_not_fit_the_model_are_refused_by_name(prompt_embeds, params, param, says):
    with pytest.raises(RequestError, match=says) as refused:
        process({"prompt_embeds": prompt_embeds}, processor(enable_prompt_embeds=True), **params)
    assert refused.value.param == param


def test_vectors_need_their_flag_and_stand_alone():
    with pytest.raises(RequestError, match="--enable-prompt-embeds"):
        process({"prompt_embeds": vectors()})
    with pytest.raises(RequestError, match="in place of a prompt"):
        process({"prompt_embeds": vectors(), "prompt_token_ids": [1]}, processor(enable_prompt_embeds=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_vectors_become_zeros_and_their_own_bytes(dtype):
    some = processor(enable_prompt_embeds=True)
    given = vectors((6, 8), dtype)
    views = [given, given[None], torch.cat([given, given])[6:], given.t().contiguous().t(), given.requires_grad_()]
    for view in views + ([given.detach().numpy()] if dtype is not torch.bfloat16 else []):
        request = process({"prompt_embeds": view, "cache_salt": "s"}, some, max_tokens=None)
        assert (request.prompt_token_ids, request.cache_salt) == ([0] * 6, "s")
        embeds = request.prompt_embeds
        assert (embeds.hidden_size, embeds.num_tokens, request.sampling_params.max_tokens) == (8, 6, 26)
        assert torch.equal(torch.frombuffer(bytearray(embeds.data), dtype=dtype).view(6, 8), given)


def test_answers_times_bytes_of_vectors_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minivllm.engine.processor._MAX_FANNED_OUT_BYTES", 1000)
    some = processor(enable_prompt_embeds=True)
    assert process({"prompt_embeds": vectors()}, some, n=6).sampling_params.n == 6
    with pytest.raises(RequestError, match="n=7 .* 160 bytes") as refused:
        process({"prompt_embeds": vectors()}, some, n=7)
    assert refused.value.param == "n"


@pytest.mark.parametrize("half", ["\ud800", "ok \udfff"])
def test_half_a_surrogate_pair_is_refused(half):
    with pytest.raises(RequestError, match="not valid Unicode"):
        SamplingParams(stop=[half])
    for prompt, request_id in ((half, "id"), ("text", half)):
        with pytest.raises(RequestError, match="not valid Unicode"):
            processor(byte_level()).process_inputs(request_id, prompt, SamplingParams())


def test_answers_times_prompt_tokens_are_bounded():
    engine = processor()
    engine.max_model_len = 100_000
    with pytest.raises(RequestError, match="n=16384 .* 5000 tokens") as refused:
        process([1] * 5000, engine, n=16384)
    assert refused.value.param == "n"


def test_max_tokens_ends_where_the_context_does():
    assert process([1] * 10, max_tokens=None).sampling_params.max_tokens == 22
    assert process([1] * 10, max_tokens=100).sampling_params.max_tokens == 22
    assert process([1] * 10, max_tokens=5).sampling_params.max_tokens == 5


def test_all_logprobs_need_max_logprobs_minus_one():
    assert process([1], processor(max_logprobs=-1), logprobs=-1).sampling_params.logprobs == -1


def test_text_is_tokenized_and_kept():
    tokenizer = byte_level()
    config = make_config()
    object.__setattr__(config.hf_config, "vocab_size", tokenizer.vocab_size)
    request, text = Processor(config, READY, tokenizer).process_inputs("id", "the fox", SamplingParams())
    assert request.prompt_token_ids == tokenizer.encode("the fox")
    assert text == "the fox"


def test_a_second_end_token_acts_as_a_stop_token_unless_eos_is_ignored():
    some = processor(generation_config={"eos_token_id": [2, 3]})
    assert process([1], some).eos_token_ids == [2]
    assert process([1], some, stop_token_ids=[5]).sampling_params.stop_token_ids == [5, 3]
    assert process([1], some, ignore_eos=True).sampling_params.stop_token_ids == []


def text_processor(tokenizer) -> Processor:
    config = make_config()
    object.__setattr__(config.hf_config, "vocab_size", tokenizer.vocab_size)
    return Processor(config, READY, tokenizer)


def test_a_bad_word_is_forbidden_at_the_start_of_a_text_and_within_one():
    tokenizer = byte_level()
    engine = text_processor(tokenizer)
    the, spaced = tokenizer.encode("the"), tokenizer.encode(" the")
    assert len(the) == len(spaced) == 1 and the != spaced
    ids = process([1], engine, bad_words=["the", " the"]).sampling_params.bad_words_token_ids
    assert ids == [the, spaced, the, spaced]
    # " " and "fox" are two tokens: the second form would forbid no more than the first.
    longer = process([1], engine, bad_words="xyz").sampling_params.bad_words_token_ids
    assert longer == [tokenizer.encode("xyz")]


def test_bad_words_have_so_many_tokens_at_most():
    with pytest.raises(RequestError, match="1024") as refused:
        process([1], text_processor(byte_level()), bad_words=["x" * 20] * 100)
    assert refused.value.param == "bad_words"


def test_a_callers_own_bad_word_tokens_never_reach_the_core():
    assert process([1], bad_words_token_ids=[[99999]]).sampling_params.bad_words_token_ids == []


def test_truncation_keeps_the_prompts_end():
    prompt = list(range(40))
    assert process(prompt, truncate_prompt_tokens=5).prompt_token_ids == [35, 36, 37, 38, 39]
    assert process(prompt[:3], truncate_prompt_tokens=5).prompt_token_ids == [0, 1, 2]
    assert process(prompt, truncate_prompt_tokens=-1, max_tokens=10).prompt_token_ids == list(range(18, 40))


def test_the_callers_parameters_are_left_alone():
    params = SamplingParams(max_tokens=None, stop_token_ids=[5])
    processor(generation_config={"eos_token_id": [2, 3]}).process_inputs("id", [1], params)
    assert (params.max_tokens, params.stop_token_ids) == (None, [5])


def test_every_request_has_a_seed_of_64_bits():
    assert process([1], seed=7).seed == 7
    assert process([1], seed=-2).seed == 2**64 - 2


def test_seeds_of_unseeded_requests_differ_and_repeat_with_the_engines_seed():
    def seeds(**model) -> list[int]:
        engine = processor(**model)
        return [process([1], engine).seed for _ in range(20)]

    assert len(set(seeds())) == 20 and all(0 <= seed < 2**64 for seed in seeds())
    assert seeds(seed=3) == seeds(seed=3) != seeds(seed=4)


def test_children_have_seeds_of_their_own():
    # Reference values: SplitMix64 started at 0, as its authors publish it.
    assert [child_seed(0, i) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert len({child_seed(seed, i) for seed in (1, 2) for i in range(100)}) == 200


def test_equal_ids_of_two_requests_do_not_collide():
    first, second = process([1]), process([1])
    assert first.request_id.startswith("id-") and first.request_id != second.request_id


@pytest.mark.parametrize("priority", [2**63, 0.5, True, "high"])
def test_a_priority_that_is_no_64_bit_number_is_refused(priority):
    with pytest.raises(RequestError) as refused:
        processor().process_inputs("id", [1], SamplingParams(), priority=priority)
    assert refused.value.param == "priority"


def test_the_generation_config_gives_defaults_under_our_names():
    config = {"temperature": 0.6, "max_new_tokens": 9, "do_sample": True, "top_k": None}
    assert default_sampling_params(config) == {"temperature": 0.6, "max_tokens": 9}
