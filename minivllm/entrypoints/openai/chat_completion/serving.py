"""Chat: a conversation to one prompt, the engine's outputs to messages, whole or in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import UNSET

from minivllm.entrypoints.answer_format import AnswerParser, AnswerPlan
from minivllm.entrypoints.chat_utils import text_of
from minivllm.entrypoints.openai.chat_completion.protocol import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    FunctionCall,
    FunctionDelta,
    Message,
    ToolCall,
    ToolCallDelta,
)
from minivllm.entrypoints.openai.logprobs import LogprobsFormatter, prompt_logprobs_body
from minivllm.entrypoints.openai.protocol import Usage
from minivllm.entrypoints.openai.render import ChatPrompt
from minivllm.entrypoints.openai.serving_base import Answering, ServingBase, check_output, in_order
from minivllm.exceptions import RequestError
from minivllm.tool_parsers.pieces import Answer, CallArguments, CallEnd, CallStart, Content, Piece, Reasoning

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from minivllm.outputs import CompletionOutput, RequestOutput
    from minivllm.sampling_params import SamplingParams


@dataclass
class _Job:
    """One request on its way."""

    request: ChatCompletionRequest
    answering: Answering
    prompt: ChatPrompt
    token_ids: list[int]  # of the prompt, as far as it is kept
    n: int
    role: str
    echo: str
    formatter: LogprobsFormatter
    plan: AnswerPlan
    num_tokens: dict[int, int] = field(default_factory=dict)  # generated so far, by choice
    parsers: dict[int, AnswerParser] = field(default_factory=dict)  # by choice
    num_cached: int | None = None  # prompt tokens from the prefix cache, if usage tells them

    def count(self, answer: CompletionOutput) -> None:
        self.num_tokens[answer.index] = self.num_tokens.get(answer.index, 0) + len(answer.token_ids)

    def parser(self, index: int) -> AnswerParser:
        if index not in self.parsers:
            self.parsers[index] = self.plan.parser(self.prompt.text, self.prompt.continued)
        return self.parsers[index]

    def pieces(self, answer: CompletionOutput) -> list[Piece]:
        """What an output adds to its choice, taken apart."""
        parser = self.parser(answer.index)
        pieces = parser.feed(answer.text)
        return pieces if answer.finish_reason is None else pieces + parser.finish()

    @property
    def usage(self) -> Usage:
        return Usage.of(len(self.token_ids), sum(self.num_tokens.values()), self.num_cached)

    def logprobs(self, answer: CompletionOutput) -> ChatLogprobs | None:
        if self.request.num_logprobs is None or not answer.logprobs:
            return None
        num_top = -1 if self.request.logprob_token_ids is not None else self.request.num_logprobs
        return self.formatter.chat(answer.token_ids, answer.logprobs, num_top)


class ServingChat(ServingBase):
    id_prefix = "chatcmpl"

    async def create(self, request: ChatCompletionRequest, raw_request: Request) -> Response:
        """Answer one request, whole or as a stream.

        Raises:
            RequestError: the request is wrong; EngineError: it failed before its first chunk.
        """
        answering = self._begin(request, raw_request)
        asked = request.num_tokens_asked
        plan = self._settings.answer_format.plan(request.tool_use, include_reasoning=request.include_reasoning)
        prompt = await self._prompt(request)
        token_ids = self._truncate(prompt.token_ids, request, asked)
        param = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = self._max_tokens(asked, None, len(token_ids), param=param)
        if request.use_beam_search:
            if request.tool_use.must_call:
                raise RequestError(
                    "use_beam_search cannot hold an answer to calls; say tool_choice auto or none",
                    param="tool_choice",
                )
            params = request.to_beam_search_params(max_tokens=max_tokens, num_logprobs=request.num_logprobs)
        else:
            params = request.to_sampling_params(
                self._defaults,
                max_tokens=max_tokens,
                logprobs=request.num_logprobs,
                prompt_logprobs=request.prompt_logprobs,
            )
            params = _with_plan(params, plan)
        role, echo = self._role_and_echo(request)
        tokenizer = self._engine.tokenizer
        formatter = LogprobsFormatter(tokenizer, as_token_ids=self._shows_token_ids(request))
        job = _Job(request, answering, prompt, token_ids, params.n, role, echo, formatter, plan)
        self._engine.check_admission(params.n)
        outputs = self._generate(token_ids, params, request, answering, request.num_logprobs)
        return await self._answer(job, outputs, params.n)

    async def _prompt(self, request: ChatCompletionRequest) -> ChatPrompt:
        hides_tools = self._settings.exclude_tools_when_none and not request.tool_use.may_call
        return await self._renderer.chat(request.conversation(with_tools=not hides_tools))

    def _role_and_echo(self, request: ChatCompletionRequest) -> tuple[str, str]:
        """Who answers, and what of the last message comes back with `echo`."""
        last = request.messages[-1]
        role = self._settings.response_role if request.add_generation_prompt else last["role"]
        return role, text_of(last, "messages[-1]") if request.echo and last["role"] == role else ""

    async def _whole(self, job: _Job, outputs: AsyncGenerator[RequestOutput, None]) -> ChatCompletion:
        bodies: dict[int, ChatChoice] = {}
        prompt_logprobs = None
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if job.num_cached is None:  # of n answers the first: the others find what it has left
                    job.num_cached = self._cached(output.num_cached_tokens)
                prompt_logprobs = output.prompt_logprobs or prompt_logprobs
                for answer in check_output(output).outputs:
                    job.count(answer)
                    bodies[answer.index] = self._choice(job, answer)
        return ChatCompletion(
            id=job.answering.id,
            created=job.answering.created,
            model=job.answering.model,
            choices=in_order(bodies, job.n),
            usage=job.usage,
            system_fingerprint=self._settings.system_fingerprint,
            prompt_logprobs=prompt_logprobs_body(prompt_logprobs),
            prompt_token_ids=job.token_ids if job.request.return_token_ids else UNSET,
        )

    @staticmethod
    def _choice(job: _Job, answer: CompletionOutput) -> ChatChoice:
        parts = Answer.of(job.pieces(answer))
        message = Message(job.role, job.echo + parts.content)
        if parts.reasoning:
            message.reasoning = parts.reasoning
        if parts.calls:
            message.tool_calls = [
                ToolCall(
                    call.id, FunctionCall(call.name, call.arguments), incomplete=UNSET if call.complete else True
                )
                for call in parts.calls
            ]
        if not message.content and (parts.reasoning or parts.calls):
            message.content = None
        return ChatChoice(
            index=answer.index,
            message=message,
            logprobs=job.logprobs(answer),
            finish_reason=job.parser(answer.index).finish_reason(answer.finish_reason),
            stop_reason=answer.stop_reason,
            token_ids=answer.token_ids if job.request.return_token_ids else UNSET,
        )

    async def _chunks(
        self, job: _Job, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[ChatCompletionChunk, None]:
        continuous = job.request.continuous_usage_stats
        opened = False
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                check_output(output)
                if job.num_cached is None:  # of n answers the first: the others find what it has left
                    job.num_cached = self._cached(output.num_cached_tokens)
                if not opened:
                    opened = True
                    for chunk in self._opening(job):
                        yield chunk
                for answer in output.outputs:
                    job.count(answer)
                    choice = self._delta(job, answer)
                    if (
                        not choice.delta.is_empty
                        or choice.logprobs
                        or choice.finish_reason
                        or choice.token_ids is not UNSET
                    ):
                        chunk = self._chunk(job, [choice])
                        if continuous:
                            chunk.usage = Usage.of(len(job.token_ids), job.num_tokens[answer.index], job.num_cached)
                        yield chunk
        if self._includes_usage(job.request):
            chunk = self._chunk(job, [])
            chunk.usage = job.usage
            yield chunk

    def _opening(self, job: _Job) -> Iterator[ChatCompletionChunk]:
        """The role of every choice, and the echo."""
        for index in range(job.n):
            chunk = self._chunk(job, [ChunkChoice(index, Delta(role=job.role, content=""))])
            if job.request.return_token_ids:
                chunk.prompt_token_ids = job.token_ids
            yield chunk
            if job.echo:
                yield self._chunk(job, [ChunkChoice(index, Delta(content=job.echo))])

    @staticmethod
    def _delta(job: _Job, answer: CompletionOutput) -> ChunkChoice:
        finished = answer.finish_reason is not None
        return ChunkChoice(
            index=answer.index,
            delta=delta_of(job.pieces(answer)),
            logprobs=job.logprobs(answer),
            finish_reason=job.parser(answer.index).finish_reason(answer.finish_reason),
            stop_reason=answer.stop_reason if finished else UNSET,
            token_ids=answer.token_ids if job.request.return_token_ids else UNSET,
        )

    def _chunk(self, job: _Job, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        answering = job.answering
        return ChatCompletionChunk(
            id=answering.id,
            created=answering.created,
            model=answering.model,
            choices=choices,
            system_fingerprint=self._settings.system_fingerprint,
        )


def _with_plan(params: SamplingParams, plan: AnswerPlan) -> SamplingParams:
    """What reading the answer asks of the engine.

    Raises:
        RequestError: the answer must call a tool, and have another form too.
    """
    if plan.needs_special_tokens:
        params = params.clone(skip_special_tokens=False)
    if (form := plan.form) is None:
        return params
    if params.structured_outputs is not None:
        raise RequestError(
            "an answer that must call a tool cannot have a form of its own as well; drop "
            f"{params.structured_outputs.param}, or tool_choice",
            param=params.structured_outputs.param,
        )
    return params.clone(structured_outputs=form)


def delta_of(pieces: list[Piece]) -> Delta:
    """Pieces of one answer as one delta: what a client that joins deltas needs to have them again."""
    delta = Delta()
    calls: dict[int, ToolCallDelta] = {}
    for piece in pieces:
        if isinstance(piece, Content):
            delta.content = (delta.content or "") + piece.text
        elif isinstance(piece, Reasoning):
            delta.reasoning = (delta.reasoning or "") + piece.text
        elif isinstance(piece, CallStart):
            function = FunctionDelta(name=piece.name, arguments="")
            calls[piece.index] = ToolCallDelta(piece.index, piece.id, "function", function)
        elif isinstance(piece, CallArguments):
            call = calls.setdefault(piece.index, ToolCallDelta(piece.index, function=FunctionDelta(arguments="")))
            call.function.arguments += piece.text
        elif isinstance(piece, CallEnd) and not piece.complete:
            call = calls.setdefault(piece.index, ToolCallDelta(piece.index, function=FunctionDelta(arguments="")))
            call.incomplete = True
    if calls:
        delta.tool_calls = list(calls.values())
    return delta
