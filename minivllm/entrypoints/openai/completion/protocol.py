"""POST /v1/completions: the bodies."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import model_validator

from minivllm.entrypoints.openai.protocol import PromptLogprobsBody, Usage
from minivllm.entrypoints.openai.sampling_fields import SamplingFields
from minivllm.exceptions import RequestError

MAX_PROMPTS = 1024


class CompletionRequest(SamplingFields):
    SUPPORTED_HERE: ClassVar[frozenset[str]] = frozenset({"best_of", "prompt_embeds"})

    # A string, token ids, or a list of either. `read_prompts` checks it: a union here would report every form.
    prompt: Any = None
    prompt_embeds: Any = None  # what torch.save wrote, in base64, or a list of these; they come before `prompt`
    max_tokens: int | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens=0 generates nothing; it needs echo=true", param="max_tokens")
        if self.logprob_token_ids is not None and (self.logprobs is None or self.max_tokens == 0):
            raise RequestError(
                f"logprob_token_ids needs logprobs={len(self.logprob_token_ids)} and an answer to report them of",
                param="logprob_token_ids",
            )
        return self

    @model_validator(mode="after")
    def _check_beams_and_echo(self) -> CompletionRequest:
        if self.use_beam_search and self.echo and (self.logprobs is not None or self.max_tokens == 0):
            raise RequestError(
                "echo with logprobs or max_tokens=0 does not go together with use_beam_search", param="echo"
            )
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is None or self.best_of == self.num_answers:
            return self
        if self.best_of < self.num_answers:
            raise RequestError(f"best_of={self.best_of} is less than n={self.num_answers}", param="best_of")
        if self.stream or self.use_beam_search:
            raise RequestError("best_of above n needs whole answers: drop stream and use_beam_search", param="best_of")
        if self.only_echoes:
            raise RequestError("best_of above n needs answers to choose from: drop max_tokens=0", param="best_of")
        return self

    @model_validator(mode="after")
    def _check_embeds(self) -> CompletionRequest:
        if self.prompt_embeds is None:
            return self
        asked = {
            "echo": self.echo,
            "prompt_logprobs": self.prompt_logprobs is not None,
            "truncate_prompt_tokens": self.truncate_prompt_tokens is not None,
            "use_beam_search": self.use_beam_search,
        }
        for name, is_asked in asked.items():
            if is_asked:
                raise RequestError(f"{name} needs prompts of tokens, and prompt_embeds have none", param=name)
        return self

    @property
    def num_answers(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def chooses(self) -> bool:
        """More answers are generated than are given back: the best `n` of `best_of`."""
        return self.best_of is not None and self.best_of > self.num_answers

    @property
    def only_echoes(self) -> bool:
        """The prompt is all that is asked for. The engine runs one token, which is dropped."""
        return self.echo and self.max_tokens == 0

    @property
    def num_prompt_logprobs(self) -> int | None:
        """An echoed prompt has the logprobs that the answer has."""
        return self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs


def read_embeds(given: Any) -> list[str]:
    """The prompts given as vectors, not decoded yet.

    Raises:
        RequestError: there is none, there are too many, or one is no string.
    """
    several = given if isinstance(given, list) else [given]
    if not 1 <= len(several) <= MAX_PROMPTS or not all(isinstance(one, str) and one for one in several):
        raise RequestError(
            f"prompt_embeds must be base64 of what torch.save wrote, or a list of 1 to {MAX_PROMPTS} of these",
            param="prompt_embeds",
        )
    return several


def read_prompts(prompt: Any, *, may_lack: bool = False) -> list[str | list[int]]:
    """The prompts of a request: each a non-empty text or non-empty token ids. may_lack: there may be none.

    Raises:
        RequestError: it is no form of prompt, empty, or there are too many.
    """
    if may_lack and prompt in (None, "", []):  # OpenAI's client must send something
        return []
    if prompt is None:
        raise RequestError("prompt is missing", param="prompt")
    many = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (str, list))
    prompts = prompt if many else [prompt]
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(
            f"{len(prompts)} prompts in one request; send at most {MAX_PROMPTS}", param="prompt"
        )
    for index, one in enumerate(prompts):
        _check_prompt(one, f"prompt[{index}]" if many else "prompt")
    return prompts


def _check_prompt(prompt: Any, name: str) -> None:
    if isinstance(prompt, (str, list)) and not prompt:
        raise RequestError(f"{name} is empty; send at least one token", param="prompt")
    is_token_ids = isinstance(prompt, list) and set(map(type, prompt)) == {int} and min(prompt) >= 0
    if not isinstance(prompt, str) and not is_token_ids:
        raise RequestError(
            f"{name} must be a text or a list of token ids (whole numbers from 0), or a list of these",
            param="prompt",
        )


class CompletionLogprobs(msgspec.Struct):
    """One entry a token; `text_offset` in characters from the start of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct):
    """Of a whole answer, and of a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobsBody | None | UnsetType = UNSET


class Completion(msgspec.Struct, tag_field="object", tag="text_completion"):
    """A whole answer, or a chunk of one."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET
    system_fingerprint: str | None = None
