"""What a request may ask of sampling. Every rule is checked in `verify`, before the engine sees the request."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import msgspec

from minivllm.exceptions import RequestError

MAX_N = 16384
MAX_STOP_STRINGS = 4
GREEDY_BELOW = 1e-5  # a temperature below this is greedy
LEAST_TEMPERATURE = 1e-2  # below it the exponentials overflow; raised to it, as vLLM does
MAX_INT64 = 2**63 - 1


class RequestOutputKind(IntEnum):
    """How outputs follow each other: whole so far, only what is new, or one at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def _check_number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse what is not a finite number within [low, high] (or (low, high])."""
    bracket = "(" if open_low else "["
    fits = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low < value if open_low else low <= value)
        and value <= high
    )
    if not fits:
        raise RequestError(f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}", param=name)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, got {value!r}", param=name)


def check_encodable(name: str, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"{error.reason} at position {error.start}"
        raise RequestError(f"{name} is not valid Unicode: {where}", param=name) from None


class SamplingParams(msgspec.Struct, omit_defaults=True, kw_only=True):
    """vLLM's names, defaults and limits.

    Raises (on construction):
        RequestError: a value is outside its range; `param` names the field.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or []))
        if self.seed == -1:
            self.seed = None
        if self.top_k == -1:
            self.top_k = 0
        if self.logprobs is True:
            self.logprobs = 1
        if self.prompt_logprobs is True:
            self.prompt_logprobs = 1
        self.verify()
        self._normalize_temperature()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def verify(self) -> None:
        """Check what needs neither model nor tokenizer.

        Raises:
            RequestError: a value is outside its range.
        """
        _check_int("n", self.n, 1, MAX_N)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_number("repetition_penalty", self.repetition_penalty, 0, 1e6, open_low=True)
        _check_number("temperature", self.temperature, 0, 2)
        _check_number("top_p", self.top_p, 0, 1, open_low=True)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_number("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _check_int("seed", self.seed, -MAX_INT64 - 1, MAX_INT64)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens or 2**31 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), -1, 2**31 - 1)
        if self.stream_interval is not None:
            _check_int("stream_interval", self.stream_interval, 1, 2**31 - 1)
        self._verify_stop()
        if self.n > 1 and self.is_greedy:
            raise RequestError(
                f"n={self.n} needs temperature > 0: greedy decoding would give {self.n} equal answers", param="n"
            )

    def _verify_stop(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} fit", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop must hold non-empty strings, got {text!r}", param="stop")
            check_encodable("stop", text)
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True; use stop_token_ids instead", param="stop")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, 2**31 - 1)

    def _normalize_temperature(self) -> None:
        if self.is_greedy:
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0
        else:
            self.temperature = max(self.temperature, LEAST_TEMPERATURE)

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields replaced."""
        return msgspec.structs.replace(self, **changes)
