"""A tokenizer as llguidance sees it: the bytes of every token, which ones are special, which ones end a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import llguidance
import msgspec

if TYPE_CHECKING:
    from minivllm.tokenizer.tokenizer import Tokenizer


class Vocabulary(msgspec.Struct, frozen=True):
    """A model's tokens."""

    tokens: list[bytes]  # as many as there are logits; b"" for those that the tokenizer lacks
    special_ids: dict[str, int]  # by text; a grammar's text never matches them
    eos_token_ids: list[int]  # any of them ends an answer; the first is the tokenizer's own

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> Vocabulary:
        """vocab_size: of the model."""
        num_known = min(tokenizer.vocab_size, vocab_size)
        tokens = [tokenizer.token_bytes(i) for i in range(num_known)] + [b""] * (vocab_size - num_known)
        special = {tokenizer.id_to_token(i): i for i in sorted(tokenizer.special_ids) if i < vocab_size}
        eos = [i for i in eos_token_ids if 0 <= i < vocab_size]
        if not eos:  # llguidance wants one: it gets one that no model can choose
            tokens, eos = [*tokens, b"<eos>"], [vocab_size]
        return cls(tokens, special, eos)

    def for_llguidance(self, tokenizer: Tokenizer | None = None) -> llguidance.LLTokenizer:
        """Takes half a second for 150,000 tokens, Python's lock held.

        tokenizer: so that text a grammar forces is cut as the model is used to; else any way that fits will do.
        """
        return llguidance.LLTokenizer(
            _Wrapper(self, tokenizer), n_vocab=len(self.tokens), eos_token=self.eos_token_ids
        )


class _Wrapper:
    """What LLTokenizer asks of a tokenizer, by these names."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, tokenizer: Tokenizer | None) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted({*vocabulary.special_ids.values(), *vocabulary.eos_token_ids})
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self._tokenizer = tokenizer
        special = set(self.special_token_ids)
        self._id_of = {token: i for i, token in enumerate(self.tokens) if token and i not in special}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids whose bytes together are the text's."""
        data = text.encode() if isinstance(text, str) else text
        if self._tokenizer is not None:
            ids = self._tokenizer.encode(data.decode("utf-8", "replace"), add_special_tokens=False)
            if b"".join(self._tokenizer.token_bytes(i) for i in ids) == data:
                return ids
        return self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token that fits, again and again; a byte that no token has is left out."""
        ids, at = [], 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                token = self._id_of.get(data[at:end])
                if token is not None:
                    ids.append(token)
                    at = end
                    break
            else:
                at += 1
        return ids
