"""Requests whose answers must have a form, or whose thinking has a budget, on their way to the core."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from minivllm.config.reasoning import ReasoningConfig
from minivllm.config.structured_outputs import StructuredOutputsConfig, read_structured_outputs_config
from minivllm.engine import processor as processor_module
from minivllm.engine.processor import Processor
from minivllm.engine.structured import make_checker
from minivllm.exceptions import ConfigError, RequestError
from minivllm.messages.codec import Decoder, encode
from minivllm.messages.engine import EngineCoreRequest
from minivllm.sampling_params import SamplingParams, ThinkingTokens
from tests.engine.engines import make_config
from tests.engine.test_processor import READY
from tests.engine.tokenizers import byte_level
from tests.structured_output.bytes import matches

OBJECT = {"json": {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"]}}
TOKENIZER = byte_level()
THINK, DONE = (TOKENIZER.encode(mark) for mark in ("<think>", "</think>"))


@pytest.fixture(scope="module", autouse=True)
def one_checker() -> Iterator[None]:
    """One process for all processors of this file."""
    config = make_config()
    object.__setattr__(config.hf_config, "vocab_size", TOKENIZER.vocab_size)
    checker = make_checker(config, TOKENIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor_module, "make_checker", lambda config, tokenizer: checker)
        yield
    checker.close()


def make(tokenizer=TOKENIZER, *, parser: str = "", **options) -> Processor:
    config = make_config()
    object.__setattr__(config.hf_config, "vocab_size", TOKENIZER.vocab_size)
    object.__setattr__(config, "structured_outputs", StructuredOutputsConfig(options or None))
    object.__setattr__(config, "reasoning", ReasoningConfig(reasoning_parser=parser))
    return Processor(config, READY, tokenizer)


def process(processor: Processor, prompt=(5,), **params) -> EngineCoreRequest:
    return processor.process_inputs("r", list(prompt), SamplingParams(**params))[0]


def test_the_grammar_travels_to_the_core():
    request = process(make(), structured_outputs=OBJECT)
    again = Decoder(EngineCoreRequest)(encode(request))
    assert again == request and matches(again.grammar, '{"a": 1, "b": 2}')
    assert process(make()).grammar is None


def test_the_servers_options_hold_for_every_request():
    spaced, tight, more = '{"a": 1, "b": 2}', '{"a":1,"b":2}', '{"a":1,"b":2,"c":3}'
    assert matches(process(make(), structured_outputs=OBJECT).grammar, spaced)
    strict = make(disable_any_whitespace=True, disable_additional_properties=True)
    grammar = process(strict, structured_outputs=OBJECT).grammar
    assert [matches(grammar, text) for text in (spaced, tight, more)] == [False, True, False]
    own = process(strict, structured_outputs={**OBJECT, "whitespace_pattern": "[ ]"}).grammar
    assert matches(own, spaced)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "xgrammar"}, "xgrammar is one of vLLM"),
        ({"backend": "mine"}, "mine is unknown"),
        ({"backed": "auto"}, "backed"),
        ({"disable_any_whitespace": "x"}, "disable_any_whitespace"),
    ],
)
def test_options_that_are_wrong_are_refused_by_name(options: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        read_structured_outputs_config(options)


def test_a_resend_keeps_its_grammar_and_must_have_it():
    processor = make()
    request = process(processor, structured_outputs=OBJECT)
    assert processor.check_resend(request, request.sampling_params) is request
    for wrong in (None, "start: nobody"):
        broken = msgspec.structs.replace(request, grammar=wrong)
        with pytest.raises(RequestError) as caught:
            processor.check_resend(broken, broken.sampling_params)
        assert caught.value.param == "structured_outputs"


def test_without_a_tokenizer_there_is_no_form():
    with pytest.raises(RequestError, match="skip-tokenizer-init"):
        process(make(None), structured_outputs=OBJECT)


def test_what_is_known_is_checked_at_once():
    processor, params = make(), SamplingParams(structured_outputs={"regex": "new here"})
    assert processor.checks_at_once(SamplingParams()) and not processor.checks_at_once(params)
    process(processor, structured_outputs={"regex": "new here"})
    assert processor.checks_at_once(params)


# Thinking


def test_where_an_answer_thinks_is_told_to_those_who_depend_on_it():
    qwen, r1 = make(parser="qwen3"), make(parser="deepseek_r1")
    budget = {"thinking_token_budget": 3}
    assert process(qwen, [9, *THINK], **budget).sampling_params.thinking == ThinkingTokens(THINK, DONE, True)
    assert process(qwen, [9], **budget).sampling_params.thinking == ThinkingTokens(THINK, DONE, False)
    assert process(r1, [9], **budget).sampling_params.thinking.is_open
    assert not process(r1, [9, *THINK, 7, *DONE], structured_outputs=OBJECT).sampling_params.thinking.is_open
    assert process(r1, [9]).sampling_params.thinking is None
    assert process(make(), structured_outputs=OBJECT).sampling_params.thinking is None


def test_a_server_may_want_the_form_in_thinking_too():
    processor = make(parser="deepseek_r1", enable_in_reasoning=True)
    assert process(processor, structured_outputs=OBJECT).sampling_params.thinking is None


def test_a_budget_needs_a_reasoning_parser():
    with pytest.raises(RequestError, match="--reasoning-parser") as caught:
        process(make(), thinking_token_budget=3)
    assert caught.value.param == "thinking_token_budget"
