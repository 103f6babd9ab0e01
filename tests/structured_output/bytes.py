"""A vocabulary of single bytes and two special tokens, and whether a text matches a grammar over it."""

from __future__ import annotations

import llguidance

from minivllm.sampling_params import StructuredOutputsParams
from minivllm.structured_output.grammar import to_grammar
from minivllm.structured_output.vocabulary import Vocabulary

EOS, CALL = 256, 257
VOCABULARY = Vocabulary(
    [*(bytes([i]) for i in range(256)), b"<|end|>", b"<|call|>", b""], {"<|end|>": EOS, "<|call|>": CALL}, [EOS]
)
TOKENIZER = VOCABULARY.for_llguidance()


def tokens_of(text: str) -> list[int]:
    """Bytes, but for the special tokens."""
    before, found, after = text.partition("<|call|>")
    return [*before.encode(), CALL, *tokens_of(after)] if found else list(before.encode())


def compiled(params: StructuredOutputsParams | str) -> llguidance.LLMatcher:
    grammar = params if isinstance(params, str) else to_grammar(params, VOCABULARY.special_ids)
    matcher = llguidance.LLMatcher(TOKENIZER, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def matches(params: StructuredOutputsParams | str, text: str) -> bool:
    """Whether the whole text does."""
    matcher, token_ids = compiled(params), tokens_of(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()
