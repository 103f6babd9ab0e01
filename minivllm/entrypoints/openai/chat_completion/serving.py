"""Chat: a conversation to one prompt, the pieces of its answers to messages, whole or in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING

from msgspec import UNSET

from minivllm.entrypoints.answer_format import AnswerPlan
from minivllm.entrypoints.chat_utils import text_of
from minivllm.entrypoints.openai.chat_completion.job import AnswerDelta, ChatJob
from minivllm.entrypoints.openai.chat_completion.protocol import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChunkChoice,
    Delta,
    FunctionCall,
    FunctionDelta,
    Message,
    ToolCall,
    ToolCallDelta,
)
from minivllm.entrypoints.openai.logprobs import LogprobsFormatter, prompt_logprobs_body
from minivllm.entrypoints.openai.render import ChatPrompt
from minivllm.entrypoints.openai.serving_base import ServingBase, in_order
from minivllm.exceptions import RequestError
from minivllm.tool_parsers.pieces import Answer, CallArguments, CallEnd, CallStart, Content, Piece, Reasoning

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from minivllm.sampling_params import SamplingParams


class ServingChat(ServingBase):
    id_prefix = "chatcmpl"

    async def create(self, request: ChatCompletionRequest, raw_request: Request) -> Response:
        """Answer one request, whole or as a stream.

        Raises:
            RequestError: the request is wrong; EngineError: it failed before its first chunk.
        """
        job = await self.begin(request, raw_request)
        return await self._answer(job, job.deltas(), job.n)

    async def whole(self, request: ChatCompletionRequest, raw_request: Request) -> ChatCompletion:
        """Raises:
        RequestError: the request is wrong; EngineError: it failed.
        """
        job = await self.begin(request, raw_request)
        return await self._whole(job, job.deltas())

    async def count_tokens(self, request: ChatCompletionRequest) -> int:
        """Tokens of the prompt that `begin` would send."""
        self._models.resolve(request.model)
        return len((await self._prompt(request)).token_ids)

    async def begin(self, request: ChatCompletionRequest, raw_request: Request, *, api: str = "chat") -> ChatJob:
        """Ask the engine. api: through which one the request came.

        Raises:
            RequestError: the request is wrong.
        """
        answering = self._begin(request, raw_request)
        asked = request.num_tokens_asked
        plan = self._settings.answer_format.plan(request.tool_use, include_reasoning=request.include_reasoning)
        prompt = await self._prompt(request)
        token_ids = self._truncate(prompt.token_ids, request, asked)
        param = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = self._max_tokens(asked, None, len(token_ids), param=param)
        if request.use_beam_search:
            if plan.form is not None:
                raise RequestError(
                    "use_beam_search cannot hold an answer to calls; say tool_choice auto or none, without strict",
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
        self._engine.check_admission(params.n)
        return ChatJob(
            request=request,
            answering=answering,
            prompt=prompt,
            token_ids=token_ids,
            n=params.n,
            role=role,
            echo=echo,
            formatter=LogprobsFormatter(tokenizer, as_token_ids=self._shows_token_ids(request)),
            plan=plan,
            tokenizer=tokenizer,
            outputs=self._generate(token_ids, params, request, answering, request.num_logprobs),
            shows_cached=self._settings.shows_cached_tokens,
            api=api,
            tool_metrics=self._settings.tool_metrics,
        )

    async def _prompt(self, request: ChatCompletionRequest) -> ChatPrompt:
        hides_tools = self._settings.exclude_tools_when_none and not request.tool_use.may_call
        return await self._renderer.chat(request.conversation(with_tools=not hides_tools))

    def _role_and_echo(self, request: ChatCompletionRequest) -> tuple[str, str]:
        """Who answers, and what of the last message comes back with `echo`."""
        last = request.messages[-1]
        role = self._settings.response_role if request.add_generation_prompt else last["role"]
        return role, text_of(last, "messages[-1]") if request.echo and last["role"] == role else ""

    async def _whole(self, job: ChatJob, deltas: AsyncGenerator[AnswerDelta, None]) -> ChatCompletion:
        bodies: dict[int, ChatChoice] = {}
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                bodies[delta.index] = self._choice(job, delta)
        return ChatCompletion(
            id=job.answering.id,
            created=job.answering.created,
            model=job.answering.model,
            choices=in_order(bodies, job.n),
            usage=job.usage(),
            system_fingerprint=self._settings.system_fingerprint,
            prompt_logprobs=prompt_logprobs_body(job.prompt_logprobs),
            prompt_token_ids=job.token_ids if job.request.return_token_ids else UNSET,
        )

    @staticmethod
    def _choice(job: ChatJob, whole: AnswerDelta) -> ChatChoice:
        parts = Answer.of(whole.pieces)
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
            index=whole.index,
            message=message,
            logprobs=whole.logprobs,
            finish_reason=whole.finish_reason,
            stop_reason=whole.stop_reason,
            token_ids=whole.token_ids if job.request.return_token_ids else UNSET,
        )

    async def _chunks(
        self, job: ChatJob, deltas: AsyncGenerator[AnswerDelta, None]
    ) -> AsyncGenerator[ChatCompletionChunk, None]:
        opened = False
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                if not opened:
                    opened = True
                    for chunk in self._opening(job):
                        yield chunk
                choice = self._chunk_choice(job, delta)
                if (
                    not choice.delta.is_empty
                    or choice.logprobs
                    or choice.finish_reason
                    or choice.token_ids is not UNSET
                ):
                    chunk = self._chunk(job, [choice])
                    if job.request.continuous_usage_stats:
                        chunk.usage = job.usage(delta.index)
                    yield chunk
        if self._includes_usage(job.request):
            chunk = self._chunk(job, [])
            chunk.usage = job.usage()
            yield chunk

    def _opening(self, job: ChatJob) -> Iterator[ChatCompletionChunk]:
        """The role of every choice, and the echo."""
        for index in range(job.n):
            chunk = self._chunk(job, [ChunkChoice(index, Delta(role=job.role, content=""))])
            if job.request.return_token_ids:
                chunk.prompt_token_ids = job.token_ids
            yield chunk
            if job.echo:
                yield self._chunk(job, [ChunkChoice(index, Delta(content=job.echo))])

    @staticmethod
    def _chunk_choice(job: ChatJob, delta: AnswerDelta) -> ChunkChoice:
        return ChunkChoice(
            index=delta.index,
            delta=delta_of(delta.pieces),
            logprobs=delta.logprobs,
            finish_reason=delta.finish_reason,
            stop_reason=UNSET if delta.finish_reason is None else delta.stop_reason,
            token_ids=delta.token_ids if job.request.return_token_ids else UNSET,
        )

    def _chunk(self, job: ChatJob, choices: list[ChunkChoice]) -> ChatCompletionChunk:
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
    if params.structured_outputs is None:
        return params.clone(structured_outputs=form)
    if plan.use.must_call:
        raise RequestError(
            "an answer that must call a tool cannot have a form of its own as well; drop "
            f"{params.structured_outputs.param}, or tool_choice",
            param=params.structured_outputs.param,
        )
    return params  # an answer of that form has no room for calls


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
