"""Texts and conversations to token ids, for every route, off the event loop.

The one place where the server tokenizes: what /tokenize shows is what the model gets.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from minivllm.entrypoints.chat_utils import ContentFormat, parse_messages, text_of
from minivllm.entrypoints.openai.sampling_fields import check_unicode
from minivllm.entrypoints.tool_use import as_prompted
from minivllm.exceptions import RequestError
from minivllm.tokenizer.chat_template import content_format

if TYPE_CHECKING:
    from minivllm.tokenizer.tokenizer import Tokenizer
    from minivllm.utils.torch_file import SavedTensor

T = TypeVar("T")

# No vocabulary has longer tokens, so a longer text cannot fit and need not be tokenized to know it.
MAX_CHARS_PER_TOKEN = 256


@dataclass(frozen=True)
class Conversation:
    """What a chat template is to make a prompt of. messages and tools are as the API has them."""

    messages: list[Any]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None  # the request's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the model gets it. continued: the answer's beginning, if the prompt ends with one."""

    text: str
    token_ids: list[int]
    continued: str | None = None


@dataclass(frozen=True)
class TemplateSettings:
    """What the operator says of chat templates. None, "auto": as the model has it."""

    chat_template: str | None = None
    content_format: ContentFormat | Literal["auto"] = "auto"
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    trust_request_template: bool = False


class Renderer:
    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int,
        templates: TemplateSettings = TemplateSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self._tokenizer = tokenizer
        self._templates = templates
        self._max_model_len = max_model_len
        # One thread: a long prompt delays other prompts, never the streams.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        # Those who wait for a template of a request's own wait beside it.
        self._apart = ThreadPoolExecutor(2, thread_name_prefix="request-template")

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

    async def tensor(self, encoded: str) -> SavedTensor:
        """A tensor as torch.save wrote it, in base64. Its data is not looked at.

        Raises:
            RequestError: it is none.
        """
        return await self._off_loop(lambda: _decode_tensor(encoded))

    async def chat(self, conversation: Conversation) -> ChatPrompt:
        """A conversation as a prompt, under the server's chat template, which writes the special tokens.

        Raises:
            RequestError: a message has a form we do not take, the template refuses the conversation, or the request
            brings its own and may not.
        """
        own = conversation.chat_template
        if own is not None and not self._templates.trust_request_template:
            raise RequestError(
                "chat_template: this server takes no templates from requests (--trust-request-chat-template)",
                param="chat_template",
            )
        template = own or self._templates.chat_template or self.tokenizer.template_for(conversation.tools)
        messages = parse_messages(conversation.messages, self._content_format(template), template=template)
        text = await self._off_loop(
            lambda: self._render(messages, conversation), self._apart if own is not None else None
        )
        self.check_text(text)
        token_ids = await self._off_loop(
            lambda: self.tokenizer.encode(text, add_special_tokens=conversation.add_special_tokens)
        )
        continued = text_of(conversation.messages[-1], "messages[-1]") if conversation.continue_final_message else None
        return ChatPrompt(text, token_ids, continued)

    def _content_format(self, template: str | None) -> ContentFormat:
        if self._templates.content_format != "auto":
            return self._templates.content_format
        return "string" if template is None else content_format(template)

    def _render(self, messages: list[dict[str, Any]], conversation: Conversation) -> str:
        return self.tokenizer.render_chat_template(
            messages,
            chat_template=conversation.chat_template or self._templates.chat_template,
            trusted=conversation.chat_template is None,
            max_chars=self._max_model_len * MAX_CHARS_PER_TOKEN,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            tools=conversation.tools and [as_prompted(tool) for tool in conversation.tools],
            documents=conversation.documents,
            **{**self._templates.template_kwargs, **conversation.template_kwargs},
        )

    def check_text(self, text: str) -> None:
        """Raises RequestError when it is longer than any text that fits, or no Unicode text."""
        longest = self._max_model_len * MAX_CHARS_PER_TOKEN
        if len(text) > longest:
            raise RequestError(
                f"the prompt has {len(text)} characters; {self._max_model_len} tokens hold at most {longest}",
                param="prompt",
            )
        check_unicode(text, "prompt")

    async def _off_loop(self, work: Callable[[], T], pool: ThreadPoolExecutor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool or self._pool, work)

    def shutdown(self) -> None:
        """Drop what is queued; the text being tokenized is finished."""
        for pool in (self._pool, self._apart):
            pool.shutdown(wait=False, cancel_futures=True)


def _decode_tensor(encoded: str) -> SavedTensor:
    from minivllm.utils.torch_file import load_tensor

    try:
        return load_tensor(base64.b64decode(encoded, validate=True))
    except ValueError as error:  # binascii.Error is one, too
        raise RequestError(f"prompt_embeds cannot be read: {error}", param="prompt_embeds") from error


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
