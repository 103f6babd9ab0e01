"""Tokens of every kind of tokenizer as llguidance sees them: their bytes are those the detokenizer writes."""

from __future__ import annotations

import llguidance
import numpy as np
import pytest

from minivllm.sampling_params import StructuredOutputsParams
from minivllm.structured_output.grammar import to_grammar
from minivllm.structured_output.vocabulary import Vocabulary
from tests.engine import tokenizers
from tests.structured_output.bytes import VOCABULARY

KINDS = {"byte_level": tokenizers.byte_level, "sentencepiece": tokenizers.sentencepiece}


def allowed(matcher: llguidance.LLMatcher) -> list[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_what_the_mask_lets_pass_reads_as_the_grammar_says(kind: str, with_tokenizer: bool):
    tokenizer = KINDS[kind]()
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size + 7, [tokenizer.eos_token_id])
    compiled = vocabulary.for_llguidance(tokenizer if with_tokenizer else None)
    schema = {
        "type": "object",
        "properties": {"the quick brown": {"const": "größer, 你好"}, "n": {"enum": ["fox the", "lazy dog"]}},
        "required": ["the quick brown", "n"],
        "additionalProperties": False,
    }
    params = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    pick = np.random.default_rng(0)
    for _ in range(20):
        matcher = llguidance.LLMatcher(compiled, to_grammar(params, vocabulary.special_ids), log_level=0)
        data = b""
        while not matcher.is_stopped():
            token = int(pick.choice(allowed(matcher)))
            assert token < tokenizer.vocab_size and token not in tokenizer.special_ids
            data += tokenizer.token_bytes(token)
            assert matcher.consume_token(token), matcher.get_error()
        text = data.decode()
        assert text.startswith('{"the quick brown":"größer, 你好","n":"') and text[37:] in ('fox the"}', 'lazy dog"}')


def test_ids_that_no_token_has_are_never_allowed():
    tokenizer = tokenizers.byte_level()
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size + 40, [tokenizer.eos_token_id])
    matcher = llguidance.LLMatcher(
        vocabulary.for_llguidance(), llguidance.LLMatcher.grammar_from_regex(r"(.|\n)*"), log_level=0
    )
    ids = allowed(matcher)
    assert tokenizer.eos_token_id in ids and len(ids) > 200 and max(ids) < tokenizer.vocab_size


def test_a_vocabulary_larger_than_the_model_is_cut():
    tokenizer = tokenizers.byte_level()
    vocabulary = Vocabulary.of(tokenizer, 200, [tokenizer.eos_token_id])
    assert len(vocabulary.tokens) == 201 and vocabulary.eos_token_ids == [200]  # its end was beyond: a stand-in


def test_without_an_end_token_an_answer_ends_where_nothing_can_follow():
    tokenizer = tokenizers.byte_level()
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size, [])
    matcher = llguidance.LLMatcher(
        vocabulary.for_llguidance(), llguidance.LLMatcher.grammar_from_regex("ab?"), log_level=0
    )
    for char in b"ab":
        ids = [token for token in allowed(matcher) if token < tokenizer.vocab_size]
        token = next(i for i in ids if tokenizer.token_bytes(i) == bytes([char]))
        assert matcher.consume_token(token)
    assert matcher.is_stopped()


def test_text_is_cut_into_the_longest_tokens_where_there_is_no_tokenizer():
    wrapper = Vocabulary([b"a", b"ab", b"b", b"abc", b"<e>"], {"<e>": 4}, [4])
    from minivllm.structured_output.vocabulary import _Wrapper

    assert _Wrapper(wrapper, None)("ababc") == [1, 3]
    assert _Wrapper(wrapper, None)(b"a?b<e>") == [0, 2]
    assert _Wrapper(VOCABULARY, None)("é") == list("é".encode())
