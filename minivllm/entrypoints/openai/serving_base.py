"""What the serving classes of completions and chat share: who they are, what fits, what they ask of the engine."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minivllm.engine.beam_search import beam_search
from minivllm.entrypoints.answer_format import AnswerFormat
from minivllm.entrypoints.openai.lifecycle import Lifecycle
from minivllm.entrypoints.openai.models.serving import ServedModels
from minivllm.entrypoints.openai.protocol import json_response
from minivllm.entrypoints.openai.render import Renderer, truncate
from minivllm.entrypoints.openai.request_log import RequestLog
from minivllm.entrypoints.openai.sampling_fields import SamplingFields, check_request_id
from minivllm.entrypoints.openai.sse import EventStream
from minivllm.exceptions import EngineGenerateError, RequestError
from minivllm.sampling_params import BeamSearchParams
from minivllm.tracing import HEADERS, RequestTracer

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from minivllm.engine.async_llm import AsyncLLM
    from minivllm.metrics.serving import ToolCallMetrics
    from minivllm.outputs import RequestOutput
    from minivllm.sampling_params import SamplingParams
    from minivllm.utils.torch_file import SavedTensor


@dataclass(frozen=True)
class ServingSettings:
    """What the server's arguments say about answers."""

    response_role: str = "assistant"
    return_tokens_as_token_ids: bool = False
    force_include_usage: bool = False
    system_fingerprint: str | None = None
    exclude_tools_when_none: bool = False
    answer_format: AnswerFormat = AnswerFormat()
    shows_cached_tokens: bool = False  # in usage
    keep_alive_s: float = 0  # see sse.EventStream
    request_log: RequestLog | None = None
    tracer: RequestTracer | None = None
    tool_metrics: ToolCallMetrics | None = None


@dataclass(frozen=True)
class Answering:
    """One request being answered: what every chunk of it repeats, and whose trace it belongs to."""

    id: str
    model: str
    created: int
    trace_headers: dict[str, str] = field(default_factory=dict)  # the caller's


class ServingBase(ABC):
    """A subclass turns its requests into a job, which holds `request` and `answering`, and the job into bodies."""

    id_prefix: str

    def __init__(
        self,
        engine: AsyncLLM,
        models: ServedModels,
        renderer: Renderer,
        lifecycle: Lifecycle,
        settings: ServingSettings,
    ) -> None:
        self._engine = engine
        self._models = models
        self._renderer = renderer
        self._lifecycle = lifecycle
        self._settings = settings
        self._max_model_len = models.max_model_len
        self._vocab_size = engine.config.hf_config.vocab_size
        self._defaults = engine.default_sampling_params

    def _begin(self, request: SamplingFields, raw_request: Request) -> Answering:
        """Name the answer.

        Raises:
            ModelNotFoundError: the request names a model that is not served; RequestError: a wrong request id.
        """
        model = self._models.resolve(request.model)
        given = raw_request.headers.get("x-request-id")
        drawn = raw_request.scope.get("minivllm.request_id") or uuid.uuid4().hex  # what X-Request-Id answers
        base = check_request_id(given) if given else request.request_id or drawn
        trace_headers = {name: value for name in HEADERS if (value := raw_request.headers.get(name))}
        return Answering(f"{self.id_prefix}-{base}", model, int(time.time()), trace_headers)

    def _check_length(self, num_prompt_tokens: int) -> None:
        """Raises RequestError when the prompt leaves no room for an answer."""
        if num_prompt_tokens >= self._max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens, and the model's context of {self._max_model_len} must "
                "also hold the answer; shorten the prompt or raise --max-model-len",
                param="prompt",
            )

    def _truncate(self, token_ids: list[int], request: SamplingFields, max_tokens: int | None) -> list[int]:
        longest = max(1, self._max_model_len - max(1, max_tokens or 1))
        return truncate(token_ids, request.truncate_prompt_tokens, request.truncation_side, longest)

    def _max_tokens(
        self, asked: int | None, default: int | None, num_prompt_tokens: int, *, param: str
    ) -> int:
        """Tokens the answer may have: what was asked, else the model's or the API's default, as far as they fit.

        Raises:
            RequestError: what was asked does not fit behind the prompt.
        """
        room = self._max_model_len - num_prompt_tokens
        if asked is not None:
            if asked > room > 0:
                raise RequestError(
                    f"{param}={asked} leaves no room: the prompt is {num_prompt_tokens} of {self._max_model_len} "
                    f"tokens; ask for at most {room}, or shorten the prompt",
                    param=param,
                )
            return asked
        default = self._defaults.get("max_tokens") or default or room
        return max(1, min(default, room))  # without room the engine's processor refuses the prompt itself

    def _generate(
        self,
        token_ids: list[int],
        params: SamplingParams | BeamSearchParams,
        request: SamplingFields,
        answering: Answering,
        num_logprobs: int | None = None,
        *,
        request_id: str | None = None,
        vectors: SavedTensor | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs. num_logprobs: what a beam search reports; else `params` say it. request_id: the
        prompt's, where there may be several; else the answer's. vectors: in place of the prompt's token ids."""
        request_id = request_id or answering.id
        if isinstance(params, BeamSearchParams):
            outputs = self._beams(token_ids, params, request, request_id, num_logprobs)
        else:
            prompt = {"prompt_token_ids": token_ids} if vectors is None else {"prompt_embeds": vectors}
            if request.cache_salt is not None:
                prompt["cache_salt"] = request.cache_salt
            outputs = self._engine.generate(prompt, params, request_id, priority=request.priority)
        if self._settings.tracer is not None:
            outputs = self._settings.tracer.watched(request_id, params, answering.trace_headers, outputs)
        log = self._settings.request_log
        if log is None:
            return outputs
        log.request(request_id, None if vectors is not None else token_ids, params, self._engine.tokenizer)
        return log.watched(request_id, outputs)

    async def _answer(self, job: Any, outputs: AsyncGenerator[Any, None], num_choices: int) -> Response:
        """The outputs as one body, or as a stream that has begun."""
        if not job.request.stream:
            return json_response(await self._whole(job, outputs))
        stream = EventStream(
            self._chunks(job, outputs),
            num_choices=num_choices,
            request_id=job.answering.id,
            lifecycle=self._lifecycle,
            keep_alive_s=self._settings.keep_alive_s,
        )
        return await stream.start()

    @abstractmethod
    async def _whole(self, job: Any, outputs: AsyncGenerator[Any, None]) -> Any:
        """The body of a whole answer."""

    @abstractmethod
    def _chunks(self, job: Any, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """The bodies of a streamed answer."""

    async def _beams(
        self,
        token_ids: list[int],
        params: BeamSearchParams,
        request: SamplingFields,
        request_id: str,
        num_logprobs: int | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        salt = request.cache_salt
        yield await beam_search(
            self._engine, token_ids, params, request_id, cache_salt=salt, num_logprobs=num_logprobs
        )

    def _shows_token_ids(self, request: SamplingFields) -> bool:
        if request.return_tokens_as_token_ids is None:
            return self._settings.return_tokens_as_token_ids
        return request.return_tokens_as_token_ids

    def _cached(self, num_cached_tokens: int | None) -> int | None:
        """Prompt tokens from the prefix cache, if usage is to tell them."""
        return (num_cached_tokens or 0) if self._settings.shows_cached_tokens else None

    def _includes_usage(self, request: SamplingFields) -> bool:
        return request.include_usage or self._settings.force_include_usage


def in_order(bodies: dict[int, Any], num_choices: int) -> list[Any]:
    """All choices of a whole answer, by index.

    Raises:
        EngineGenerateError: one is missing or never finished.
    """
    if len(bodies) < num_choices or any(body.finish_reason is None for body in bodies.values()):
        raise EngineGenerateError("the engine ended before its answer was finished")
    return [bodies[index] for index in sorted(bodies)]


def check_output(output: RequestOutput) -> RequestOutput:
    """Raises EngineGenerateError when the engine gave the request up."""
    if output.error is not None or any(answer.finish_reason == "error" for answer in output.outputs):
        raise EngineGenerateError(output.error or "the engine failed on this request; it can be sent again")
    return output
