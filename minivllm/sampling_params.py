"""What a request may ask of sampling. Every rule is checked in `verify`, before the engine sees the request."""

from __future__ import annotations

import json as json_module
import math
from enum import IntEnum
from typing import Any, ClassVar

import msgspec

from minivllm.exceptions import RequestError
from minivllm.utils.json_depth import is_deeper

MAX_N = 16384
MAX_STOP_STRINGS = 4
MAX_BAD_WORDS = 128
MAX_LOGPROB_TOKEN_IDS = 128
MAX_STOP_TOKEN_IDS = 4096
MAX_BIASED_TOKENS = 16_384
MAX_EXTRA_VALUES = 4096  # in extra_args, at all levels
MAX_PATTERN_SIZE = 1024  # a step of the scheduler compares so many patterns at most
MAX_EXTRA_DEPTH = 16  # of extra_args
GREEDY_BELOW = 1e-5  # a temperature below this is greedy
LEAST_TEMPERATURE = 1e-2  # below it the exponentials overflow; raised to it, as vLLM does
LEAST_REPETITION_PENALTY = 1e-3  # logits are divided by it, and must stay finite
MAX_INT64 = 2**63 - 1
MAX_GRAMMAR_CHARS = 1 << 18  # of a schema, expression or grammar, or of all choices together
MAX_CHOICES = 10_000
MAX_SCHEMA_DEPTH = 64  # levels of JSON; around it a structural tag may have some of its own
MAX_TAG_DEPTH = MAX_SCHEMA_DEPTH + 16


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


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {value!r}", param=name)


class RepetitionDetectionParams(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """End an answer whose last tokens are `min_count` equal patterns of min … max_pattern_size tokens.

    A max_pattern_size of 0 detects nothing; a min_pattern_size of 0 means 1.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def verify(self) -> None:
        """Raises RequestError: a number is out of its range, or the smallest is above the largest."""
        name = "repetition_detection"
        _check_int(f"{name}.max_pattern_size", self.max_pattern_size, 0, MAX_PATTERN_SIZE)
        _check_int(f"{name}.min_pattern_size", self.min_pattern_size, 0, self.max_pattern_size)
        _check_int(f"{name}.min_count", self.min_count, 2 if self.max_pattern_size else 0, 2**31 - 1)


def check_encodable(name: str, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"{error.reason} at position {error.start}"
        raise RequestError(f"{name} is not valid Unicode: {where}", param=name) from None


class StructuredOutputsParams(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What form an answer must have: exactly one kind of constraint. vLLM's names and limits.

    JSON is kept as text, which says what no message could (numbers of more than 64 bits). Whether llguidance can do
    what is asked is found out by the engine's processor, before the engine sees it.

    Raises (on construction):
        RequestError: none or several kinds, or a value of the wrong type or size; `param` names the field.
    """

    json: str | dict[str, Any] | None = None  # a JSON schema
    regex: str | None = None  # the whole answer matches
    choice: list[str] | None = None
    grammar: str | None = None  # Lark as llguidance reads it, or GBNF (::=)
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # in JSON
    disable_additional_properties: bool = False  # where a schema lists properties and says nothing of others
    whitespace_pattern: str | None = None  # between the tokens of JSON
    structural_tag: str | dict[str, Any] | None = None  # free text with constrained parts, see docs
    param: str = "structured_outputs"  # the request's field that this came from, for errors

    KINDS: ClassVar[tuple[str, ...]] = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

    def __post_init__(self) -> None:
        given = [name for name in self.KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise self.error(
                f"exactly one of {', '.join(self.KINDS)} must be given, got {', '.join(given) or 'none of them'}"
            )
        [kind] = given
        getattr(self, f"_check_{kind}")()
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            _check_flag(f"{self.param}.{name}", getattr(self, name))
        if self.whitespace_pattern is not None:
            self._check_text("whitespace_pattern", self.whitespace_pattern, may_be_blank=True)
            if self.disable_any_whitespace:
                raise self.error("whitespace_pattern and disable_any_whitespace exclude each other")

    def error(self, message: str) -> RequestError:
        """What is wrong with the field that this came from."""
        return RequestError(f"{self.param}: {message}", param=self.param)

    def _check_json(self) -> None:
        self.json = self._object_text("json", self.json, MAX_SCHEMA_DEPTH)

    def _check_structural_tag(self) -> None:
        self.structural_tag = self._object_text("structural_tag", self.structural_tag, MAX_TAG_DEPTH)

    def _check_regex(self) -> None:
        self._check_text("regex", self.regex)

    def _check_grammar(self) -> None:
        self._check_text("grammar", self.grammar)

    def _check_choice(self) -> None:
        if not isinstance(self.choice, list) or not 1 <= len(self.choice) <= MAX_CHOICES:
            raise self.error(f"choice must be a list of 1 to {MAX_CHOICES} strings")
        for one in self.choice:
            self._check_text("choice", one, may_be_blank=True)
        self._check_size("choice", sum(map(len, self.choice)))

    def _check_json_object(self) -> None:
        if self.json_object is not True:
            raise self.error(f"json_object must be true or left out, got {self.json_object!r}")

    def _check_text(self, name: str, text: Any, *, may_be_blank: bool = False) -> None:
        if not isinstance(text, str) or not (text.strip() or may_be_blank):
            raise self.error(f"{name} must be a string that is not empty, got {text!r:.80}")
        if "\0" in text:
            raise self.error(f"{name} holds a NUL character")
        self._check_size(name, len(text))
        check_encodable(self.param, text)

    def _object_text(self, name: str, given: Any, max_depth: int) -> str:
        """A JSON object, given as text or taken apart, as text."""
        if isinstance(given, str):
            self._check_text(name, given)
            try:
                given = json_module.loads(given)
            except (ValueError, RecursionError) as error:
                raise self.error(f"{name} is no valid JSON: {error}") from None
        if not isinstance(given, dict):
            raise self.error(f"{name} must be a JSON object, got {type(given).__name__}")
        if is_deeper(given, max_depth):
            raise self.error(f"{name} is nested deeper than {max_depth} levels")
        try:
            text = json_module.dumps(given, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise self.error(f"{name} is no valid JSON: {error}") from None
        self._check_size(name, len(text))
        check_encodable(self.param, text)
        return text

    def _check_size(self, name: str, num_chars: int) -> None:
        if num_chars > MAX_GRAMMAR_CHARS:
            raise self.error(f"{name} has {num_chars} characters; at most {MAX_GRAMMAR_CHARS} fit")


class ThinkingTokens(msgspec.Struct):
    """How a model marks what it thinks, and whether this answer begins with it."""

    start: list[int]  # [] where nothing opens it but the prompt
    end: list[int]
    is_open: bool
    withheld: list[int] = []  # while it is open: the model's end tokens, where a form has still to follow


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
    prompt_logprob_token_ids: list[list[int]] | None = None
    prompt_logprob_start: int | None = None
    flat_logprobs: bool = False
    skip_reading_prefix_cache: bool | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprob_token_ids: list[int] | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    truncate_prompt_tokens: int | None = None
    spaces_between_special_tokens: bool = True
    thinking_token_budget: int | None = None
    extra_args: dict[str, Any] | None = None
    bad_words_token_ids: list[list[int]] = []  # made of bad_words by the engine's processor
    structured_outputs: StructuredOutputsParams | None = None
    thinking: ThinkingTokens | None = None  # where something depends on it: made by the engine's processor

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
        if self.thinking_token_budget == -1:
            self.thinking_token_budget = None
        self.bad_words = [self.bad_words] if isinstance(self.bad_words, str) else list(self.bad_words or [])
        if isinstance(self.repetition_detection, dict):
            self.repetition_detection = _repetition_detection(self.repetition_detection)
        if isinstance(self.structured_outputs, dict):
            self.structured_outputs = read_structured_outputs(self.structured_outputs)
        self.verify()
        self._normalize_temperature()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def scores_prompt(self) -> bool:
        """Whether logprobs of the prompt's own tokens, or of others at their places, were asked for."""
        return self.prompt_logprobs is not None or self.prompt_logprob_token_ids is not None

    def verify(self) -> None:
        """Check what needs neither model nor tokenizer.

        Raises:
            RequestError: a value is outside its range.
        """
        _check_int("n", self.n, 1, MAX_N)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_number("repetition_penalty", self.repetition_penalty, LEAST_REPETITION_PENALTY, 1e6)
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
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1:
            _check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, 2**31 - 1)
        _check_flag("spaces_between_special_tokens", self.spaces_between_special_tokens)
        if self.thinking_token_budget is not None:
            _check_int("thinking_token_budget", self.thinking_token_budget, 0, 2**31 - 1)
        self._verify_stop()
        self._verify_logit_bias()
        self._verify_bad_words()
        self._verify_logprob_token_ids()
        self._verify_prompt_logprob_token_ids()
        _check_flag("flat_logprobs", self.flat_logprobs)
        if self.skip_reading_prefix_cache is not None:
            _check_flag("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
            if not self.skip_reading_prefix_cache and self.scores_prompt:
                raise RequestError(
                    "skip_reading_prefix_cache=False, but logprobs of the prompt need all of it computed; leave it out",
                    param="skip_reading_prefix_cache",
                )
        if self.repetition_detection is not None:
            self.repetition_detection.verify()
        if self.extra_args is not None:
            _check_extra_args(self.extra_args)
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
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"stop_token_ids holds {len(self.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} fit",
                param="stop_token_ids",
            )
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, 2**31 - 1)

    def _verify_logit_bias(self) -> None:
        if self.logit_bias is not None and len(self.logit_bias) > MAX_BIASED_TOKENS:
            raise RequestError(
                f"logit_bias holds {len(self.logit_bias)} tokens; at most {MAX_BIASED_TOKENS} fit", param="logit_bias"
            )

    def _verify_bad_words(self) -> None:
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise RequestError(
                f"bad_words holds {len(self.bad_words)} words; at most {MAX_BAD_WORDS} fit", param="bad_words"
            )
        for word in self.bad_words:
            if not isinstance(word, str) or not word.strip():
                raise RequestError(f"bad_words must hold words that are not empty, got {word!r}", param="bad_words")
            check_encodable("bad_words", word)

    def _verify_logprob_token_ids(self) -> None:
        ids = self.logprob_token_ids
        if ids is None:
            return
        if not isinstance(ids, list) or not 1 <= len(ids) <= MAX_LOGPROB_TOKEN_IDS:
            raise RequestError(
                f"logprob_token_ids must be a list of 1 to {MAX_LOGPROB_TOKEN_IDS} token ids", param="logprob_token_ids"
            )
        for token in ids:
            _check_int("logprob_token_ids", token, 0, 2**31 - 1)
        if self.logprobs is None:
            self.logprobs = len(ids)
        elif self.logprobs != len(ids):
            raise RequestError(
                f"logprobs={self.logprobs} must equal the {len(ids)} logprob_token_ids; leave it out",
                param="logprobs",
            )

    def _verify_prompt_logprob_token_ids(self) -> None:
        name, rows = "prompt_logprob_token_ids", self.prompt_logprob_token_ids
        if rows is None:
            if self.prompt_logprob_start is not None:
                raise RequestError(f"prompt_logprob_start needs {name}", param="prompt_logprob_start")
            return
        if hasattr(rows, "tolist"):  # an array
            rows = self.prompt_logprob_token_ids = rows.tolist()
        if not (isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)):
            raise RequestError(f"{name} must be a list of lists of token ids", param=name)
        width = len(rows[0])
        if not 1 <= width <= MAX_LOGPROB_TOKEN_IDS or any(len(row) != width for row in rows):
            raise RequestError(
                f"{name} must hold rows of equal length, 1 to {MAX_LOGPROB_TOKEN_IDS} ids; fill up with -1", param=name
            )
        for row in rows:
            for token in row:
                _check_int(name, token, -1, 2**31 - 1)
        if self.prompt_logprob_start is not None:
            _check_int("prompt_logprob_start", self.prompt_logprob_start, 0, 2**31 - 1)

    def _normalize_temperature(self) -> None:
        if self.is_greedy:
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0
        else:
            self.temperature = max(self.temperature, LEAST_TEMPERATURE)

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields replaced."""
        return msgspec.structs.replace(self, **changes)


class BeamSearchParams(msgspec.Struct, omit_defaults=True):
    """What a request may ask of beam search. vLLM's names, defaults and limits.

    Raises (on construction):
        RequestError: a value is outside its range; `param` names the field.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0  # above 0, a sampled token joins the likeliest that each beam offers
    length_penalty: float = 1.0  # above 1 favours long answers
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_int("beam_width", self.beam_width, 1, MAX_N)
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_number("temperature", self.temperature, 0, 2)
        _check_number("length_penalty", self.length_penalty, -10, 10)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            _check_flag(name, getattr(self, name))

    @property
    def n(self) -> int:
        """How many answers there are."""
        return self.beam_width


def _repetition_detection(given: dict[str, Any]) -> RepetitionDetectionParams:
    """From a request's body. Raises RequestError: a name is unknown or a value is no whole number."""
    try:
        return msgspec.convert(given, RepetitionDetectionParams)
    except msgspec.ValidationError as error:
        raise RequestError(f"repetition_detection: {error}", param="repetition_detection") from None


def read_structured_outputs(given: dict[str, Any], param: str = "structured_outputs") -> StructuredOutputsParams:
    """From a request's body. Raises RequestError: a name is unknown or a value wrong."""
    if "param" in given:
        raise RequestError(f"{param}: there is no field param", param=param)
    try:
        return msgspec.convert({**given, "param": param}, StructuredOutputsParams)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, RequestError):
            raise error.__cause__ from None
        raise RequestError(f"{param}: {error}".replace("`", ""), param=param) from None


def _check_extra_args(given: Any) -> None:
    """What travels to the core must be what MessagePack can say: JSON's values, whole numbers of 64 bits.

    Raises:
        RequestError: it holds something else, or is nested too deep.
    """
    if not isinstance(given, dict):
        raise RequestError(f"extra_args must be a dict, got {type(given).__name__}", param="extra_args")
    level: list[Any] = [given]
    num_values = 0
    for _ in range(MAX_EXTRA_DEPTH):
        num_values += len(level)
        if num_values > MAX_EXTRA_VALUES:
            raise RequestError(f"extra_args hold more than {MAX_EXTRA_VALUES} values", param="extra_args")
        for value in level:
            _check_extra_value(value)
        level = [
            item
            for value in level
            if isinstance(value, (dict, list, tuple))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise RequestError(f"extra_args are nested deeper than {MAX_EXTRA_DEPTH} levels", param="extra_args")


def _check_extra_value(value: Any) -> None:
    if isinstance(value, dict):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise RequestError(f"extra_args: the key {wrong!r} is not a string", param="extra_args")
        for key in value:
            check_encodable("extra_args", key)
    elif isinstance(value, str):
        check_encodable("extra_args", value)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise RequestError(f"extra_args: {value} does not fit into 64 bits", param="extra_args")
    elif value is not None and not isinstance(value, (bool, int, float, list, tuple)):
        raise RequestError(
            f"extra_args: {type(value).__name__} is no value that JSON has", param="extra_args"
        )
