"""A user's prompt and parameters to an `EngineCoreRequest`: the one place where a request is checked.

Owns validation against the model (vocabulary, lengths, logprobs), defaults, end-of-sequence tokens, seeds
and internal request ids. What passes here cannot make a step of the engine fail.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

from minivllm.config.engine import EngineConfig
from minivllm.engine.parallel_sampling import child_seed
from minivllm.exceptions import RequestError, UnsupportedError
from minivllm.messages.engine import EngineCoreReady, EngineCoreRequest
from minivllm.sampling_params import SamplingParams
from minivllm.tokenizer.tokenizer import Tokenizer

_MASK_64 = (1 << 64) - 1


class _TextPrompt(TypedDict):
    prompt: str


class TextPrompt(_TextPrompt, total=False):
    """A prompt as text."""

    cache_salt: str


class _TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


class TokensPrompt(_TokensPrompt, total=False):
    """A prompt as token ids, perhaps with the text they came from."""

    prompt: str
    cache_salt: str


Prompt = str | list[int] | TextPrompt | TokensPrompt

_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
_MAX_CACHE_SALT = 1024  # characters
# generation_config.json's names -> SamplingParams' names
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters a model's generation config sets, under `SamplingParams`' names."""
    return {
        ours: generation_config[theirs]
        for theirs, ours in _DEFAULTS.items()
        if generation_config.get(theirs) is not None
    }


def _check_priority(priority: int) -> None:
    """It only has to fit its message: without `--scheduling-policy priority` it is ignored, as vLLM does."""
    if not isinstance(priority, int) or isinstance(priority, bool) or not -(2**63) <= priority < 2**63:
        raise RequestError(f"priority={priority!r} must be a whole number of 64 bits", param="priority")


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt taken apart: exactly one of text and token_ids may be missing."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str | None = None


def parse_prompt(prompt: Prompt) -> ParsedPrompt:
    """Read any of the prompt forms.

    Raises:
        RequestError: it is none of them.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None)
    if isinstance(prompt, (list, tuple)):
        return ParsedPrompt(None, list(prompt))
    if not isinstance(prompt, dict):
        raise RequestError(
            f"a prompt is a string, a list of token ids or a dict, not {type(prompt).__name__}",
            param="prompt",
        )
    unknown = set(prompt) - _PROMPT_KEYS
    if unknown:
        raise UnsupportedError(f"prompt key {sorted(unknown)[0]!r} is not supported yet", param="prompt")
    text, token_ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt must be a string, not {type(text).__name__}", param="prompt")
    if token_ids is not None and not isinstance(token_ids, (list, tuple)):
        raise RequestError("prompt_token_ids must be a list of token ids", param="prompt")
    if text is None and token_ids is None:
        raise RequestError('a prompt dict needs "prompt" or "prompt_token_ids"', param="prompt")
    if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= _MAX_CACHE_SALT):
        raise RequestError(
            f"cache_salt must be a string of 1 to {_MAX_CACHE_SALT} characters", param="cache_salt"
        )
    return ParsedPrompt(text, None if token_ids is None else list(token_ids), salt)


class Processor:
    """Makes requests for one engine. Holds no state of any request; its methods may run in any thread.

    A request without a seed gets one from `--seed` and its place in the order of requests: a script run again
    samples the same, and equal requests still differ.
    """

    def __init__(self, config: EngineConfig, ready: EngineCoreReady, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = ready.max_model_len
        self._seed = config.model.seed & _MASK_64
        self._num_seeded = itertools.count()  # next() is atomic
        self.vocab_size = config.hf_config.vocab_size
        max_logprobs = config.model.max_logprobs
        self.max_logprobs = self.vocab_size if max_logprobs == -1 else max_logprobs
        self.eos_token_ids, self.extra_stop_token_ids = self._end_tokens(config)

    def _end_tokens(self, config: EngineConfig) -> tuple[list[int], list[int]]:
        """The end-of-sequence token, and further ones that act as stop_token_ids (vLLM's division)."""
        declared = config.generation_config.get("eos_token_id", config.hf_config.eos_token_ids)
        declared = [declared] if isinstance(declared, int) else list(declared or [])
        primary = self.tokenizer.eos_token_id if self.tokenizer is not None else None
        if primary is None and declared:
            primary = declared[0]
        eos = [] if primary is None else [primary]
        return eos, [
            token for token in dict.fromkeys(declared) if token not in eos and 0 <= token < self.vocab_size
        ]

    def process_inputs(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> tuple[EngineCoreRequest, str | None]:
        """The request for the core, and the prompt's text if it came as text.

        Raises:
            RequestError: the prompt or a parameter does not fit this model; `param` names it.
        """
        parsed = parse_prompt(prompt)
        token_ids = self._token_ids(parsed)
        self._check_params(params)
        _check_priority(priority)
        request = EngineCoreRequest(
            request_id=f"{request_id}-{os.urandom(4).hex()}",
            prompt_token_ids=token_ids,
            sampling_params=self._complete(params, len(token_ids)),
            seed=self._seed_of(params),
            eos_token_ids=self.eos_token_ids,
            arrival_time=time.monotonic(),
            priority=priority,
            cache_salt=parsed.cache_salt,
        )
        return request, parsed.text

    def _token_ids(self, parsed: ParsedPrompt) -> list[int]:
        token_ids = parsed.token_ids
        if token_ids is None:
            if self.tokenizer is None:
                raise RequestError(
                    "text prompts need a tokenizer; send token ids, or drop --skip-tokenizer-init",
                    param="prompt",
                )
            token_ids = self.tokenizer.encode(parsed.text)
        self._check_token_ids(token_ids)
        if len(token_ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, and the model's context of {self.max_model_len} must also "
                "hold the answer; shorten the prompt or raise --max-model-len",
                param="prompt",
            )
        return token_ids

    def _check_token_ids(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; send at least one token", param="prompt")
        try:
            numbers = array("q", token_ids)  # refuses what is no whole number, at C speed
        except (TypeError, OverflowError) as error:
            raise RequestError(
                f"a prompt of token ids must hold whole numbers: {error}", param="prompt"
            ) from error
        low, high = min(numbers), max(numbers)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(
                f"token id {wrong} is outside the vocabulary of {self.vocab_size}", param="prompt"
            )

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            self._check_logprobs(name, getattr(params, name))
        self._check_in_vocabulary("stop_token_ids", params.stop_token_ids)
        if params.allowed_token_ids is not None:
            if not params.allowed_token_ids:
                raise RequestError(
                    "allowed_token_ids is empty; name at least one token", param="allowed_token_ids"
                )
            self._check_in_vocabulary("allowed_token_ids", params.allowed_token_ids)
        if params.logit_bias:
            self._check_in_vocabulary("logit_bias", params.logit_bias)
            self._check_biases(params.logit_bias)
        if params.stop and self.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer; use stop_token_ids, or drop --skip-tokenizer-init",
                param="stop",
            )

    def _check_logprobs(self, name: str, asked: int | None) -> None:
        if asked is None:
            return
        wanted = self.vocab_size if asked == -1 else asked
        if wanted > self.max_logprobs:
            raise RequestError(
                f"{name}={asked} asks for {wanted} logprobs, more than --max-logprobs {self.max_logprobs}",
                param=name,
            )

    def _check_in_vocabulary(self, name: str, token_ids: Iterable[int] | None) -> None:
        for token in token_ids or ():
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"{name}: {token!r} is no token id of a vocabulary of {self.vocab_size}", param=name
                )

    @staticmethod
    def _check_biases(logit_bias: dict[int, float]) -> None:
        for token, bias in logit_bias.items():
            if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not math.isfinite(bias):
                raise RequestError(
                    f"logit_bias of token {token} must be a finite number, got {bias!r}", param="logit_bias"
                )

    def _complete(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """The parameters as the core runs them. The answer ends where the context does, as in vLLM."""
        room = self.max_model_len - num_prompt_tokens
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens={params.min_tokens} leaves no room: the prompt is {num_prompt_tokens} of "
                f"{self.max_model_len} tokens; lower it, shorten the prompt or raise --max-model-len",
                param="min_tokens",
            )
        changes: dict[str, Any] = {"max_tokens": max_tokens}
        if self.extra_stop_token_ids and not params.ignore_eos:
            changes["stop_token_ids"] = [*params.stop_token_ids, *self.extra_stop_token_ids]
        if self.tokenizer is None:
            changes["detokenize"] = False
        return params.clone(**changes)

    def _seed_of(self, params: SamplingParams) -> int:
        """0 … 2**64 - 1: the request's own, a negative one in two's complement, or the next of ours."""
        if params.seed is None:
            return child_seed(self._seed, next(self._num_seeded))
        return params.seed & _MASK_64
