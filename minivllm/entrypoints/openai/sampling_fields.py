"""The request fields that completions and chat share, and their way into `SamplingParams`.

A new sampling option is a field here. Ranges are checked once, by `SamplingParams`; here only what is
about the body itself. Known fields that this version does not implement are refused by name; unknown ones
are ignored, as vLLM does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from minivllm.entrypoints.openai.accepted_values import (
    COMMON,
    Accepts,
    anything,
    empty,
    null,
    one_of,
    refuse_others,
)
from minivllm.entrypoints.openai.errors import renamed
from minivllm.entrypoints.openai.protocol import StreamOptions
from minivllm.exceptions import RequestError, UnsupportedError
from minivllm.logger import init_logger
from minivllm.sampling_params import (
    BeamSearchParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
    read_structured_outputs,
)

logger = init_logger(__name__)

MAX_LOGIT_BIAS = 100.0
MAX_ID_CHARS = 256
# What a model's generation_config.json may set.
WITH_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OTHER_NAMES = {"extra_args": "vllm_xargs"}  # the engine's name of a field -> its name in a body

# Fields vLLM has, which would change the answer: name -> the values that change nothing, and are accepted.
NOT_YET: dict[str, Accepts] = {
    "audio": null,
    "best_of": one_of(None, 1),
    "chat_template": null,
    "documents": empty,
    "ec_transfer_params": null,
    "function_call": one_of(None, "none"),
    "functions": empty,
    "kv_transfer_params": null,
    "logits_processors": empty,
    "media_io_kwargs": empty,
    "mm_payload": null,
    "mm_processor_kwargs": empty,
    "modalities": one_of(None, ["text"]),
    "prompt_embeds": null,
    "reasoning_effort": null,
    "return_mm_kwargs": empty,
    "return_prompt_text": empty,
    "return_token_offsets": empty,
    "routed_experts_prompt_start": one_of(None, 0),
    "suffix": empty,
    "tool_choice": one_of(None, "none"),
    "watermarking": null,
    "web_search_options": null,
}

# Fields of the OpenAI API or of vLLM that cannot change the answer: name -> the values for which that is so.
HARMLESS: dict[str, Accepts] = {
    **COMMON,
    "include_reasoning": anything,
    "metadata": anything,
    "prediction": anything,  # a hint for speed
    "store": empty,
    "verbosity": one_of(None, "medium"),
}

# What beam search would not heed: name -> the values that ask for nothing. Others are refused beside it.
NOT_WITH_BEAMS: dict[str, Accepts] = {
    "stream": empty,
    "top_p": one_of(None, 1),
    "top_k": one_of(None, 0, -1),
    "min_p": empty,
    "presence_penalty": empty,
    "frequency_penalty": empty,
    "repetition_penalty": one_of(None, 1),
    "logit_bias": empty,
    "allowed_token_ids": null,
    "stop": empty,
    "stop_token_ids": empty,
    "min_tokens": empty,
    "bad_words": empty,
    "logprob_token_ids": null,
    "repetition_detection": null,
    "vllm_xargs": empty,
    "prompt_logprobs": null,
    "structured_outputs": null,
    "thinking_token_budget": one_of(None, -1),
    "response_format": lambda v: v is None or v.get("type") == "text",
}

# What were fields of their own once -> their names in structured_outputs.
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
}


class SamplingFields(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    SUPPORTED_HERE: ClassVar[frozenset[str]] = frozenset()  # names of NOT_YET that this endpoint does have
    KNOWN_ELSEWHERE: ClassVar[frozenset[str]] = frozenset({*NOT_YET, *HARMLESS})  # not "unknown", though no field here

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: int | None = None
    user: str | None = None
    request_id: str | None = None
    priority: int = 0
    cache_salt: str | None = None

    n: int | None = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    bad_words: list[str] | None = None
    logprob_token_ids: list[int] | None = None
    repetition_detection: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    thinking_token_budget: int | None = None

    use_beam_search: bool = False
    length_penalty: float = 1.0

    echo: bool = False
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, body: Any) -> Any:
        if isinstance(body, Mapping):
            for name in (NOT_YET.keys() & body.keys()) - cls.SUPPORTED_HERE:
                if not NOT_YET[name](body[name]):
                    raise UnsupportedError(f"{name} is not supported yet; leave it out", param=name)
            refuse_others(_harmless_to(cls), body)
        return body

    @model_validator(mode="before")
    @classmethod
    def _read_guided_fields(cls, body: Any) -> Any:
        """The deprecated guided_* fields mean what they meant, under their new name."""
        if not isinstance(body, Mapping) or not (given := [name for name in GUIDED if body.get(name) is not None]):
            return body
        for name in given:
            note_deprecated(name, f"structured_outputs.{GUIDED[name]}")
        renamed = {GUIDED[name]: body[name] for name in given}
        rest = {name: value for name, value in body.items() if name not in GUIDED}
        wanted = rest.get("structured_outputs") or {}
        if not isinstance(wanted, Mapping):
            return rest  # which is refused for that
        return {**rest, "structured_outputs": {**renamed, **wanted}}

    @model_validator(mode="after")
    def _check_what_belongs_together(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", param="stream_options")
        if self.stream and self.prompt_logprobs not in (None, 0):
            raise RequestError(
                "prompt_logprobs comes with whole answers only; drop stream", param="prompt_logprobs"
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids is empty: no token could be chosen", param="allowed_token_ids"
            )
        if self.request_id is not None:
            check_request_id(self.request_id)
        if self.truncation_side not in (None, "left", "right"):
            raise RequestError("truncation_side must be left or right", param="truncation_side")
        check_unicode(self.cache_salt or "", "cache_salt")
        self._check_beams()
        for text in [self.stop] if isinstance(self.stop, str) else self.stop or []:
            check_unicode(text, "stop")
        return self

    def _check_beams(self) -> None:
        if not self.use_beam_search:
            if self.length_penalty != 1:
                raise RequestError("length_penalty needs use_beam_search=true", param="length_penalty")
            return
        for name, asks_for_nothing in NOT_WITH_BEAMS.items():
            if not asks_for_nothing(getattr(self, name)):
                raise RequestError(f"{name} does not go together with use_beam_search; leave it out", param=name)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage_stats(self) -> bool:
        return self.include_usage and self.stream_options.continuous_usage_stats

    def to_sampling_params(
        self,
        defaults: Mapping[str, Any],
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """The engine's parameters: the body's values over the model's generation config over vLLM's defaults.

        Raises:
            RequestError: a value is outside its range.
        """
        given = {name: getattr(self, name) for name in WITH_MODEL_DEFAULTS}
        chosen = {name: value if value is not None else defaults.get(name) for name, value in given.items()}
        fields = dict(
            n=1 if self.n is None else self.n,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
            stream_interval=self.stream_interval,
            logit_bias=_logit_bias(self.logit_bias),
            allowed_token_ids=self.allowed_token_ids,
            bad_words=self.bad_words,
            logprob_token_ids=self.logprob_token_ids,
            repetition_detection=self.repetition_detection,
            extra_args=self.vllm_xargs or None,
            structured_outputs=self.to_structured_outputs(),
            thinking_token_budget=self.thinking_token_budget,
            **{name: value for name, value in chosen.items() if value is not None},
        )
        try:
            return SamplingParams(**fields)
        except RequestError as error:
            raise renamed(error, OTHER_NAMES) from None

    def to_structured_outputs(self) -> StructuredOutputsParams | None:
        """The form that `response_format` or `structured_outputs` ask for; the second may add options to the first.

        Raises:
            RequestError: there is none such, or two.
        """
        wanted = _response_format(self.response_format) if self.response_format is not None else {}
        if not wanted:
            return None if self.structured_outputs is None else read_structured_outputs(self.structured_outputs)
        return read_structured_outputs({**(self.structured_outputs or {}), **wanted}, "response_format")

    def to_beam_search_params(self, *, max_tokens: int, num_logprobs: int | None) -> BeamSearchParams:
        """n is the width. Without a temperature there is none, so that a search is the same each time.

        Raises:
            RequestError: a value is outside its range.
        """
        params = BeamSearchParams(
            beam_width=1 if self.n is None else self.n,
            max_tokens=max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature or 0.0,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
        )
        if num_logprobs is not None and not 0 <= num_logprobs <= 2 * params.beam_width:
            raise RequestError(
                f"logprobs={num_logprobs}: a search of {params.beam_width} beams has from 0 to {2 * params.beam_width}",
                param="logprobs",
            )
        return params


@functools.cache
def _harmless_to(model: type[SamplingFields]) -> dict[str, Accepts]:
    """Those of HARMLESS that are no fields of a body."""
    return {name: HARMLESS[name] for name in HARMLESS.keys() - model.model_fields.keys()}


def _response_format(format: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's field as ours; {} for plain text.

    Raises:
        RequestError: it has another type, or lacks its schema.
    """
    kind = format.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_object": True}
    if kind == "structural_tag":
        return {"structural_tag": format}
    if kind != "json_schema":
        raise RequestError(
            f"response_format.type must be text, json_object, json_schema or structural_tag, got {kind!r:.80}",
            param="response_format",
        )
    named = format.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise RequestError(
            "response_format.json_schema must hold a schema, a JSON object", param="response_format"
        )
    return {"json": schema}


@functools.cache
def note_deprecated(name: str, instead: str) -> None:
    """Say so in the log, once a field."""
    logger.warning("the request field %s is deprecated; send %s", name, instead)


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    """Token ids as numbers, biases clamped to ±100 as the OpenAI API defines them."""
    if not bias:
        return None
    clamped = {}
    for key, value in bias.items():
        if not key.isdecimal() or not key.isascii():
            raise RequestError(f"logit_bias keys must be token ids, got {key[:40]!r}", param="logit_bias")
        if math.isnan(value):
            raise RequestError(f"logit_bias[{key[:40]}] is not a number", param="logit_bias")
        clamped[int(key[:20])] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, value))
    return clamped


def check_unicode(text: str, param: str) -> None:
    """JSON can spell half a surrogate pair, which no encoding of text can carry.

    Raises:
        RequestError: the text holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{param} is not Unicode: a lone surrogate at character {error.start}"
        raise RequestError(message, param=param) from None


def check_request_id(request_id: str) -> str:
    """An id comes back in bodies and log lines, so it is short and printable.

    Raises:
        RequestError: it is not.
    """
    if not 1 <= len(request_id) <= MAX_ID_CHARS or not request_id.isprintable():
        raise RequestError(
            f"a request id must be 1 to {MAX_ID_CHARS} printable characters", param="request_id"
        )
    return request_id
