"""Texts and conversations to token ids, for every route, off the event loop.

The one place where the server tokenizes: what /tokenize shows is what the model gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from minivllm.entrypoints.chat_utils import parse_messages
from minivllm.entrypoints.openai.sampling_fields import check_unicode
from minivllm.exceptions import RequestError

if TYPE_CHECKING:
    from minivllm.entrypoints.openai.chat_completion.protocol import ChatFields
    from minivllm.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")

# No vocabulary has longer tokens, so a longer text cannot fit and need not be tokenized to know it.
MAX_CHARS_PER_TOKEN = 256


class Renderer:
    def __init__(self, tokenizer: Tokenizer | None, *, chat_template: str | None, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._max_model_len = max_model_len
        # One thread: a long prompt delays other prompts, never the streams.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError when the server runs without one."""
        if self._tokenizer is None:
            raise RequestError(
                "this server runs with --skip-tokenizer-init: send prompts as token ids to /v1/completions",
                param="prompt",
            )
        return self._tokenizer

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            RequestError: it is longer than any text that fits, or no Unicode text.
        """
        self.check_text(text)
        return await self._off_loop(
            lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens shown."""
        return await self._off_loop(lambda: self.tokenizer.decode(token_ids, skip_special_tokens=False))

    async def chat(self, request: ChatFields) -> list[int]:
        """Token ids of a conversation under the server's chat template, which writes the special tokens.

        Raises:
            RequestError: a message has a form we do not take, or the template refuses the conversation.
        """
        messages = parse_messages(request.messages)
        return await self._off_loop(lambda: self._render(messages, request))

    def _render(self, messages: list[dict[str, Any]], request: ChatFields) -> list[int]:
        text = self.tokenizer.render_chat_template(
            messages,
            chat_template=self._chat_template,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            tools=request.tools or None,
            **(request.chat_template_kwargs or {}),
        )
        self.check_text(text)
        return self.tokenizer.encode(text, add_special_tokens=request.add_special_tokens)

    def check_text(self, text: str) -> None:
        """Raises RequestError when it is longer than any text that fits, or no Unicode text."""
        longest = self._max_model_len * MAX_CHARS_PER_TOKEN
        if len(text) > longest:
            raise RequestError(
                f"the prompt has {len(text)} characters; {self._max_model_len} tokens hold at most {longest}",
                param="prompt",
            )
        check_unicode(text, "prompt")

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def shutdown(self) -> None:
        """Drop what is queued; the text being tokenized is finished."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def truncate(token_ids: list[int], limit: int | None, side: str | None, longest: int) -> list[int]:
    """The last `limit` tokens (side "right": the first); limit -1: `longest`, None: all.

    Raises:
        RequestError: the limit is 0, below -1, or above what fits.
    """
    if limit is None:
        return token_ids
    if limit == 0 or limit < -1 or limit > longest:
        raise RequestError(
            f"truncate_prompt_tokens must be -1 or from 1 to {longest}, got {limit}",
            param="truncate_prompt_tokens",
        )
    limit = longest if limit == -1 else limit
    return token_ids[:limit] if side == "right" else token_ids[-limit:]
