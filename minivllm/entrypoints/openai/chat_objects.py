"""Chat whose answers are objects rather than HTTP: what the APIs that are spoken through chat are made of.

An API of another shape turns its request into a `ChatCompletionRequest`, so that the prompt is the one chat would
render, and what comes back into its own bodies and events.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import UNSET
from pydantic import ValidationError

from minivllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
)
from minivllm.entrypoints.openai.chat_completion.serving import ServingChat
from minivllm.exceptions import EngineGenerateError, RequestError

if TYPE_CHECKING:
    from starlette.requests import Request

    from minivllm.entrypoints.openai.protocol import Usage


class ServingChatObjects(ServingChat):
    """`create` returns a ChatCompletion, or for `stream=true` a generator of chunks that has not begun."""

    async def _answer(self, job: Any, outputs: AsyncGenerator[Any, None], num_choices: int) -> Any:
        return self._chunks(job, outputs) if job.request.stream else await self._whole(job, outputs)

    async def whole(self, request: ChatCompletionRequest, raw_request: Request) -> ChatCompletion:
        assert not request.stream
        return await self.create(request, raw_request)

    async def stream(
        self, request: ChatCompletionRequest, raw_request: Request
    ) -> AsyncGenerator[ChatCompletionChunk, None]:
        assert request.stream
        return await self.create(request, raw_request)

    async def count_tokens(self, request: ChatCompletionRequest) -> int:
        """Tokens of the prompt that `create` would send."""
        self._models.resolve(request.model)
        return len((await self._prompt(request)).token_ids)


class Reasoning(NamedTuple):
    text: str


class Text(NamedTuple):
    text: str
    logprobs: list[Any] = []  # of ChatLogprob


class CallBegin(NamedTuple):
    """A tool call. Its arguments follow, as text that is JSON once it is whole."""

    id: str
    name: str


class CallArguments(NamedTuple):
    text: str


class End(NamedTuple):
    """finish_reason, stop_reason: chat's."""

    finish_reason: str
    stop_reason: int | str | None
    usage: Usage


Piece = Reasoning | Text | CallBegin | CallArguments | End


def chat_request(fields: dict[str, Any], names: dict[str, str]) -> ChatCompletionRequest:
    """The chat request of these fields. names: chat's name of a field -> the one its client wrote.

    Raises:
        RequestError: chat refuses it; the error names the client's field.
    """
    try:
        return ChatCompletionRequest(**fields)
    except RequestError as error:
        raise renamed(error, names) from None
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        head, dot, rest = name.partition(".")
        raise RequestError(first["msg"], param=names.get(head, head) + dot + rest) from None


def string_field(given: dict[str, Any], name: str, place: str) -> str:
    """A field of an object that stands at `place` in a request.

    Raises:
        RequestError: it is missing, or no string.
    """
    if not isinstance(given.get(name), str):
        raise RequestError(f"{place}.{name} must be a string", param=f"{place}.{name}")
    return given[name]


def renamed(error: RequestError, names: dict[str, str]) -> RequestError:
    """The error with its field's name as the client wrote it."""
    head, dot, rest = (error.param or "").partition(".")
    if head in names:
        error.param = names[head] + dot + rest
        error.message = error.message.replace(head, names[head])
    return error


def pieces_of(body: ChatCompletion) -> list[Piece]:
    """The one answer of a whole completion."""
    (choice,) = body.choices
    message = choice.message
    pieces: list[Piece] = []
    if reasoning := _get(message, "reasoning"):
        pieces.append(Reasoning(reasoning))
    if message.content:
        pieces.append(Text(message.content, _logprobs(choice)))
    for call in _get(message, "tool_calls") or ():
        pieces += [CallBegin(call.id, call.function.name), CallArguments(call.function.arguments)]
    return [*pieces, End(choice.finish_reason, choice.stop_reason, body.usage)]


class ChunkReader:
    """The one answer of a stream that was asked for with usage in every chunk (`continuous_usage_stats`)."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None

    def read(self, chunk: ChatCompletionChunk) -> list[Piece]:
        """What a chunk adds."""
        if chunk.usage is not UNSET:
            self.usage = chunk.usage
        pieces: list[Piece] = []
        for choice in chunk.choices:
            delta = choice.delta
            if reasoning := _get(delta, "reasoning"):
                pieces.append(Reasoning(reasoning))
            if content := _get(delta, "content"):
                pieces.append(Text(content, _logprobs(choice)))
            for call in _get(delta, "tool_calls") or ():
                if name := _get(call.function, "name"):
                    pieces.append(CallBegin(call.id, name))
                if arguments := _get(call.function, "arguments"):
                    pieces.append(CallArguments(arguments))
            if choice.finish_reason is not None:
                self._finish_reason = choice.finish_reason
                self._stop_reason = _get(choice, "stop_reason")
        return pieces

    def end(self) -> End:
        """Raises:
        EngineGenerateError: the answer never finished.
        """
        if self._finish_reason is None or self.usage is None:
            raise EngineGenerateError("the engine ended the stream before its answer was finished")
        return End(self._finish_reason, self._stop_reason, self.usage)


def _get(struct: Any, name: str) -> Any:
    value = getattr(struct, name, None)
    return None if value is UNSET else value


def _logprobs(choice: Any) -> list[Any]:
    return [] if choice.logprobs is None else list(choice.logprobs.content or ())
