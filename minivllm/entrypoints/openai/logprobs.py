"""Logprobs in the shapes of the two APIs. Reads the engine's `Logprob`s; computes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from minivllm.entrypoints.openai.chat_completion.protocol import ChatLogprob, ChatLogprobs, TopLogprob
from minivllm.entrypoints.openai.completion.protocol import CompletionLogprobs
from minivllm.entrypoints.openai.protocol import PromptLogprob, PromptLogprobsBody
from minivllm.outputs import Logprob, PromptLogprobs
from minivllm.tokenizer.tokenizer import Tokenizer

LEAST = -9999.0  # what -inf becomes, which JSON cannot say


class LogprobsFormatter:
    """as_token_ids: show every token as token_id:N, so that none is ambiguous."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids or tokenizer is None

    def completion(
        self, token_ids: list[int], rows: Iterable[dict[int, Logprob] | None], text_offset: int
    ) -> CompletionLogprobs:
        """One row a token; `text_offset` is where the first token's text begins, in characters."""
        body = CompletionLogprobs([], [], [], [])
        for token_id, row in zip(token_ids, rows):
            text = self._text(token_id, row)
            body.tokens.append(text)
            body.text_offset.append(text_offset)
            body.token_logprobs.append(None if row is None else _finite(row[token_id].logprob))
            body.top_logprobs.append(None if row is None else self._by_text(row))
            text_offset += len(text)
        return body

    def chat(self, token_ids: list[int], rows: Iterable[dict[int, Logprob]], num_top: int) -> ChatLogprobs:
        """num_top: most likely tokens to list at each position; -1: all there are."""
        return ChatLogprobs(
            [self._chat_token(token_id, row, num_top) for token_id, row in zip(token_ids, rows)]
        )

    def _chat_token(self, token_id: int, row: dict[int, Logprob], num_top: int) -> ChatLogprob:
        # Stable: the token itself first.
        likeliest = sorted(row, key=lambda candidate: -row[candidate].logprob)
        top = likeliest if num_top == -1 else likeliest[:num_top]
        return ChatLogprob(
            token=self._text(token_id, row),
            logprob=_finite(row[token_id].logprob),
            bytes=self._bytes(token_id),
            top_logprobs=[
                TopLogprob(self._text(i, row), _finite(row[i].logprob), self._bytes(i)) for i in top
            ],
        )

    def _by_text(self, row: dict[int, Logprob]) -> dict[str, float]:
        """Two tokens may have one text (parts of characters do); the first, which is the token's own, is kept."""
        by_text: dict[str, float] = {}
        for candidate, logprob in row.items():
            by_text.setdefault(self._text(candidate, row), _finite(logprob.logprob))
        return by_text

    def _text(self, token_id: int, row: dict[int, Logprob] | None) -> str:
        if self._as_token_ids:
            return f"token_id:{token_id}"
        decoded = row[token_id].decoded_token if row is not None else None
        return self._tokenizer.token_text(token_id) if decoded is None else decoded

    def _bytes(self, token_id: int) -> list[int] | None:
        """Exact even where the text is not: a token may hold a part of a character."""
        return None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))


def prompt_logprobs_body(rows: PromptLogprobs | None) -> PromptLogprobsBody | None:
    if rows is None:
        return None
    return [
        None
        if row is None
        else {
            token: PromptLogprob(_finite(lp.logprob), lp.rank, lp.decoded_token) for token, lp in row.items()
        }
        for row in rows
    ]


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
