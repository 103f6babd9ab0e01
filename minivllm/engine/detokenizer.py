"""One answer's tokens to text, as they come: whole characters only, and no further than a stop string.

Owns the text of one request. Knows nothing of queues, logprobs or the engine.
"""

from __future__ import annotations

import codecs

from minivllm.sampling_params import SamplingParams
from minivllm.tokenizer.tokenizer import Tokenizer

_CONTEXT_TOKENS = 8  # of the prompt's tail; enough for the up to three open bytes of a divided character
# For a tokenizer of unknown kind: what then still ends in U+FFFD is no divided character.
_MAX_PENDING_TOKENS = 8


class ByteDecoder:
    """Tokens whose bytes are known: a UTF-8 reader that keeps the open bytes of a divided character.

    Most tokens are whole characters and follow whole ones: these need no reader, their text is known.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], skip_special_tokens: bool) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._whole_texts = tokenizer.whole_texts
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_leading_space and not self._has_visible_tail(prompt_token_ids)
        self._takes_whole_texts = not self._at_start  # nothing is open
        for token in prompt_token_ids[-_CONTEXT_TOKENS:]:
            self.add(token)

    def _has_visible_tail(self, prompt_token_ids: list[int]) -> bool:
        return any(
            token not in self._hidden and self._bytes_of(token)
            for token in prompt_token_ids[-_CONTEXT_TOKENS:]
        )

    def add(self, token: int) -> str:
        """The text that this token completes."""
        if self._takes_whole_texts and (text := self._whole_texts[token]) is not None:
            return text
        if token in self._hidden:
            return ""
        data = self._bytes_of(token)
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        text = self._utf8.decode(data)
        open_bytes, _ = self._utf8.getstate()
        self._takes_whole_texts = not (open_bytes or self._at_start)
        return text

    def flush(self) -> str:
        """U+FFFD for a character that will not be completed, else nothing."""
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """Any other tokenizer: decode a short window with and without the new token; the difference is the new text.

    The window reaches from one place where the text was whole to the next, as in TGI and vLLM.
    joined: added tokens, as the library spells them; of two that follow each other, the space between is left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        skip_special_tokens: bool,
        joined: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._joined = joined
        self._after_joined = False
        self._context = prompt_token_ids[-_CONTEXT_TOKENS:]
        self._pending: list[int] = []

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def add(self, token: int) -> str:
        self._pending.append(token)
        before, after = self._decode(self._context), self._decode(self._context + self._pending)
        if after.endswith("\ufffd") and len(self._pending) < _MAX_PENDING_TOKENS:
            return ""
        text = self._advance(before, after)
        after_joined, self._after_joined = self._after_joined, token in self._joined
        return text.lstrip(" ") if after_joined and self._after_joined else text

    def flush(self) -> str:
        return self._advance(self._decode(self._context), self._decode(self._context + self._pending))

    def _advance(self, before: str, after: str) -> str:
        if self._pending and len(after) > len(before):
            self._context, self._pending = self._pending, []
        else:  # no text of its own: keep it as context, lest the next token look like a beginning
            self._context, self._pending = self._context + self._pending, []
        return after[len(before) :]


class IncrementalDetokenizer:
    """The text of one answer so far, and what of it may be shown.

    An answer that was begun elsewhere goes on from its tokens: `continue_from`.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_token_ids: list[int], params: SamplingParams
    ) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self._shown = 0  # characters already given out by `next_text(delta=True)`
        self._stop = params.stop
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        # A stop string may have begun in what is there; its last character cannot have come yet.
        self._held_back = max(map(len, self._stop)) - 1 if self._stop and not self._include_stop else 0
        self._stop_before: str | None = None  # the stop string that had already ended what this continues
        self._decoder = None
        if tokenizer is not None and params.detokenize:
            self._decoder = _decoder(tokenizer, prompt_token_ids, params)

    def continue_from(self, token_ids: list[int], *, ended_by_stop_token: bool) -> None:
        """Take what had been generated, and shown token by token, before this detokenizer was made.

        Should a stop string end in it, the tokens behind that are left out, and so are all that follow.
        """
        for i, token in enumerate(token_ids):
            last = i == len(token_ids) - 1
            stop = self.update([token], ended_by_stop_token=last and ended_by_stop_token, finished=False)
            if stop is not None:
                self._stop_before = stop
                return
            self.next_text(finished=False, delta=True)

    @property
    def has_ended(self) -> bool:
        """Whether a stop string stands in what it continued from: nothing that comes counts."""
        return self._stop_before is not None

    def update(self, new_token_ids: list[int], *, ended_by_stop_token: bool, finished: bool) -> str | None:
        """Take new tokens; the stop string that now ends the text, if one does.

        A stop token's own text is left out unless include_stop_str_in_output. Once a stop string is found
        the text is cut there, and nothing more may be added.
        """
        if self._stop_before is not None:
            return self._stop_before
        if self._decoder is None:
            self.token_ids += new_token_ids
            return None
        silent = (
            len(new_token_ids) - 1 if ended_by_stop_token and not self._include_stop else len(new_token_ids)
        )
        for i, token in enumerate(new_token_ids):
            self.token_ids.append(token)
            new_text = self._decoder.add(token) if i < silent else ""
            if finished and i == len(new_token_ids) - 1:
                new_text += self._decoder.flush()
            stop = self._append(new_text)
            if stop is not None:
                self.token_ids += new_token_ids[i + 1 :]
                return stop
        if finished and not new_token_ids:
            return self._append(self._decoder.flush())
        return None

    def _append(self, new_text: str) -> str | None:
        if not new_text:
            return None
        searched = len(self.text)
        self.text += new_text
        if not self._stop or len(self.token_ids) <= self._min_tokens:
            return None
        return self._cut_at_stop(searched)

    def _cut_at_stop(self, searched: int) -> str | None:
        """Cut the text at the stop string that is complete first (of two that end together, the longer)."""
        found = None
        for stop in self._stop:
            start = self.text.find(stop, max(0, searched - len(stop) + 1))
            if start != -1:
                candidate = (start + len(stop), start, stop)
                found = candidate if found is None else min(found, candidate)
        if found is None:
            return None
        end, start, stop = found
        self.text = self.text[: end if self._include_stop else start]
        return stop

    def next_text(self, *, finished: bool, delta: bool) -> str:
        """What may be shown now: all of it, or with `delta` what was not shown before."""
        text, shown = self.text, self._shown
        end = len(text)
        if self._held_back and not finished:
            end = max(end - self._held_back, 0)
        if not delta:
            return text[:end]
        if end > shown:
            self._shown = end
        return text[shown:end]


def _decoder(
    tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams
) -> ByteDecoder | WindowDecoder:
    """The decoder for a tokenizer's kind. Only the libraries put spaces between special tokens."""
    if tokenizer.kind != "other":
        return ByteDecoder(tokenizer, prompt_token_ids, params.skip_special_tokens)
    is_joined = not (params.skip_special_tokens or params.spaces_between_special_tokens)
    joined = tokenizer.added_ids if is_joined else frozenset()
    return WindowDecoder(tokenizer, prompt_token_ids, params.skip_special_tokens, joined)
