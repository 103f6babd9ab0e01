"""Completions: prompts to the engine, its outputs to choices, whole or in chunks.

Choice index = prompt index · n + the answer's index. Knows nothing of HTTP but the request id's header.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from minivllm.engine.prompt_embeds import check_taken, shape_of
from minivllm.entrypoints.openai.completion.protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    read_embeds,
    read_prompts,
)
from minivllm.entrypoints.openai.logprobs import LogprobsFormatter, prompt_logprobs_body
from minivllm.entrypoints.openai.protocol import Usage
from minivllm.entrypoints.openai.serving_base import Answering, ServingBase, check_output, in_order
from minivllm.entrypoints.openai.sse import TextEvent
from minivllm.entrypoints.openai.utils import merge
from minivllm.exceptions import RequestError
from minivllm.sampling_params import MAX_N

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from minivllm.outputs import CompletionOutput, PromptLogprobs, RequestOutput
    from minivllm.sampling_params import BeamSearchParams, SamplingParams
    from minivllm.utils.torch_file import SavedTensor

DEFAULT_MAX_TOKENS = 16


@dataclass
class _Prompt:
    """One prompt of the request."""

    index: int
    token_ids: list[int]  # [] where `vectors` stand for them
    params: SamplingParams | BeamSearchParams
    echo: str | None  # its text, when it is to be given back
    vectors: SavedTensor | None = None
    num_vectors: int = 0
    logprobs: PromptLogprobs | None = None
    num_cached: int | None = None  # tokens from the prefix cache, if usage tells them

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_vectors


@dataclass
class _Choice:
    """How far one choice has come."""

    prompt: _Prompt
    index: int
    started: bool = False
    num_tokens: int = 0
    num_chars: int = 0
    cumulative_logprob: float = 0.0
    event: TextEvent | None = None  # of chunks that hold nothing but text


@dataclass
class _Job:
    """One request on its way."""

    request: CompletionRequest
    answering: Answering
    prompts: list[_Prompt]
    formatter: LogprobsFormatter
    choices: dict[int, _Choice] = field(default_factory=dict)
    prompts_by_id: dict[str, _Prompt] = field(init=False)  # as the engine names what it answers

    def __post_init__(self) -> None:
        self.prompts_by_id = {f"{self.answering.id}-{prompt.index}": prompt for prompt in self.prompts}

    @property
    def n(self) -> int:
        return self.prompts[0].params.n

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def usage(self) -> Usage:
        num_prompt_tokens = sum(prompt.num_tokens for prompt in self.prompts)
        cached = [prompt.num_cached for prompt in self.prompts if prompt.num_cached is not None]
        num_tokens = sum(choice.num_tokens for choice in self.choices.values())
        return Usage.of(num_prompt_tokens, num_tokens, sum(cached) if cached else None)


class ServingCompletion(ServingBase):
    id_prefix = "cmpl"

    async def create(self, request: CompletionRequest, raw_request: Request) -> Response:
        """Answer one request, whole or as a stream.

        Raises:
            RequestError: the request is wrong; EngineError: it failed before its first chunk.
        """
        answering = self._begin(request, raw_request)
        embeds = self._embeds(request)
        given = read_prompts(request.prompt, may_lack=bool(embeds))
        for prompt in given:  # what can be seen of all, before any takes time
            self._check_prompt(prompt, request)
        prompts = [await self._prompt_of_vectors(i, encoded, request) for i, encoded in enumerate(embeds)]
        prompts += [await self._prompt(i, prompt, request) for i, prompt in enumerate(given, len(embeds))]
        if len(prompts) * prompts[0].params.n > MAX_N:
            raise RequestError(
                f"{len(prompts)} prompts with n={request.n} are more than {MAX_N} answers; send several requests",
                param="n",
            )
        tokenizer = self._engine.tokenizer
        formatter = LogprobsFormatter(tokenizer, as_token_ids=self._shows_token_ids(request))
        job = _Job(request, answering, prompts, formatter)
        self._engine.check_admission(job.num_choices)
        outputs = merge(
            [
                self._generate(
                    prompt.token_ids,
                    prompt.params,
                    request,
                    answering,
                    request.logprobs,
                    request_id=request_id,
                    vectors=prompt.vectors,
                )
                for request_id, prompt in job.prompts_by_id.items()
            ]
        )
        return await self._answer(job, outputs, job.num_choices)

    def _embeds(self, request: CompletionRequest) -> list[str]:
        """Raises RequestError where this server takes none, whatever they hold."""
        if request.prompt_embeds is None:
            return []
        check_taken(self._engine.config.model)
        return read_embeds(request.prompt_embeds)

    def _check_prompt(self, prompt: str | list[int], request: CompletionRequest) -> None:
        """Raises RequestError when it cannot fit, however it is tokenized, or is outside the vocabulary."""
        if isinstance(prompt, str):
            self._renderer.check_text(prompt)
            return
        if max(prompt) >= self._vocab_size:
            raise RequestError(
                f"token id {max(prompt)} is outside the vocabulary of {self._vocab_size}", param="prompt"
            )
        if request.truncate_prompt_tokens is None:
            self._check_length(len(prompt))

    async def _prompt(self, index: int, prompt: str | list[int], request: CompletionRequest) -> _Prompt:
        if isinstance(prompt, str):
            token_ids = await self._renderer.encode(prompt, add_special_tokens=request.add_special_tokens)
        else:
            token_ids = prompt
        kept = self._truncate(token_ids, request, request.max_tokens)
        self._check_length(len(kept))  # the engine would, but after all the other prompts are tokenized
        params = self._params(request, len(kept))
        echo = None
        if request.echo:
            echo = (
                prompt if isinstance(prompt, str) and kept is token_ids else await self._renderer.decode(kept)
            )
        return _Prompt(index, kept, params, echo)

    async def _prompt_of_vectors(self, index: int, encoded: str, request: CompletionRequest) -> _Prompt:
        vectors = await self._renderer.tensor(encoded)
        num_vectors, _ = shape_of(vectors, self._engine.config.hf_config.hidden_size)
        self._check_length(num_vectors)
        return _Prompt(index, [], self._params(request, num_vectors), None, vectors, num_vectors)

    def _params(self, request: CompletionRequest, num_prompt_tokens: int) -> SamplingParams | BeamSearchParams:
        asked = 1 if request.only_echoes else request.max_tokens
        max_tokens = self._max_tokens(asked, DEFAULT_MAX_TOKENS, num_prompt_tokens, param="max_tokens")
        if request.use_beam_search:
            return request.to_beam_search_params(max_tokens=max_tokens, num_logprobs=request.logprobs)
        params = request.to_sampling_params(
            self._defaults,
            max_tokens=max_tokens,
            logprobs=(request.logprobs or 0) if request.chooses else request.logprobs,
            prompt_logprobs=request.num_prompt_logprobs,
        )
        return params.clone(n=request.best_of) if request.chooses else params

    async def _whole(self, job: _Job, outputs: AsyncGenerator[RequestOutput, None]) -> Completion:
        bodies: dict[int, CompletionChoice] = {}
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                for choice, answer in self._answers(job, output):
                    body = bodies[choice.index] = self._body(job, choice, answer)
                    choice.cumulative_logprob = answer.cumulative_logprob or 0.0
                    if job.request.prompt_logprobs is not None:
                        body.prompt_logprobs = prompt_logprobs_body(choice.prompt.logprobs)
        choices = in_order(bodies, job.num_choices)
        return self._completion(job, _best(job, choices) if job.request.chooses else choices, job.usage)

    async def _chunks(
        self, job: _Job, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[Completion | bytes, None]:
        continuous = job.request.continuous_usage_stats
        only_text = not (continuous or job.request.return_token_ids or job.request.only_echoes)
        only_text = only_text and job.request.logprobs is None
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                for choice, answer in self._answers(job, output):
                    if only_text and choice.started and answer.finish_reason is None:
                        choice.num_tokens += len(answer.token_ids)
                        if answer.text:
                            yield self._text_event(job, choice, answer.text)
                        continue
                    body = self._body(job, choice, answer)
                    if body.text or body.logprobs or body.finish_reason or body.token_ids is not UNSET:
                        usage = (
                            Usage.of(choice.prompt.num_tokens, choice.num_tokens, choice.prompt.num_cached)
                            if continuous
                            else UNSET
                        )
                        yield self._completion(job, [body], usage)
        if self._includes_usage(job.request):
            yield self._completion(job, [], job.usage)

    def _text_event(self, job: _Job, choice: _Choice, text: str) -> bytes:
        """As most chunks are: after the first and before the last, of a request that asks for text alone."""
        if choice.event is None:
            choice.event = TextEvent(
                lambda text: self._completion(job, [CompletionChoice(index=choice.index, text=text)], UNSET)
            )
        return choice.event(text)

    def _answers(self, job: _Job, output: RequestOutput) -> list[tuple[_Choice, CompletionOutput]]:
        prompt = job.prompts_by_id[output.request_id]
        if prompt.num_cached is None:  # of n answers the first: the others find what it has left
            prompt.num_cached = self._cached(output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            prompt.logprobs = output.prompt_logprobs
        answers = []
        for answer in check_output(output).outputs:
            number = prompt.index * job.n + answer.index
            choice = job.choices.get(number)
            if choice is None:
                choice = job.choices[number] = _Choice(prompt, number)
            answers.append((choice, answer))
        return answers

    def _body(self, job: _Job, choice: _Choice, answer: CompletionOutput) -> CompletionChoice:
        """What an output adds to its choice; the first time, with the echoed prompt before it."""
        request, prompt = job.request, choice.prompt
        text, token_ids, rows = answer.text, answer.token_ids, answer.logprobs or []
        finish_reason, stop_reason = answer.finish_reason, answer.stop_reason
        if request.only_echoes:
            text, token_ids, rows, stop_reason = "", [], [], None
            finish_reason = finish_reason and "length"
        choice.num_tokens += len(token_ids)
        shown_ids, first = token_ids, not choice.started
        choice.started = True
        if first and prompt.echo is not None:
            text = prompt.echo + text
            if request.logprobs is not None:
                shown_ids, rows = prompt.token_ids + token_ids, [*(prompt.logprobs or []), *rows]
        return CompletionChoice(
            index=choice.index,
            text=text,
            logprobs=self._logprobs(job, choice, shown_ids, rows),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            token_ids=token_ids if request.return_token_ids else UNSET,
            prompt_token_ids=prompt.token_ids if request.return_token_ids and first and prompt.token_ids else UNSET,
        )

    @staticmethod
    def _logprobs(job: _Job, choice: _Choice, token_ids: list[int], rows: list) -> CompletionLogprobs | None:
        if job.request.logprobs is None or not token_ids:
            return None
        body = job.formatter.completion(token_ids, rows, choice.num_chars)
        choice.num_chars += sum(map(len, body.tokens))
        return body

    def _completion(self, job: _Job, choices: list[CompletionChoice], usage: Usage | UnsetType) -> Completion:
        answering = job.answering
        return Completion(
            id=answering.id,
            created=answering.created,
            model=answering.model,
            choices=choices,
            usage=usage,
            system_fingerprint=self._settings.system_fingerprint,
        )


def _best(job: _Job, bodies: list[CompletionChoice]) -> list[CompletionChoice]:
    """Of each prompt's choices the n with the highest logprob per token, as OpenAI defines `best_of`; numbered anew."""

    def score(body: CompletionChoice) -> float:
        choice = job.choices[body.index]
        return choice.cumulative_logprob / max(choice.num_tokens, 1)

    chosen = [
        body
        for begin in range(0, len(bodies), job.n)
        for body in sorted(bodies[begin : begin + job.n], key=score, reverse=True)[: job.request.num_answers]
    ]
    for index, body in enumerate(chosen):
        body.index = index
    return chosen
