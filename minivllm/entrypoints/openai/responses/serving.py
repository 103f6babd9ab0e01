"""Responses, spoken through chat: items, events, and conversations that go on from a stored answer."""

from __future__ import annotations

import contextlib
import copy
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins

from minivllm.entrypoints.openai.chat_completion.job import AnswerDelta, ChatJob
from minivllm.entrypoints.openai.errors import error_info, renamed
from minivllm.entrypoints.openai.lifecycle import Lifecycle
from minivllm.entrypoints.openai.protocol import Usage, json_response
from minivllm.entrypoints.openai.responses.convert import NAMES, input_messages, output_messages, to_chat
from minivllm.entrypoints.openai.responses.protocol import (
    CallItem,
    Deleted,
    Event,
    InputDetails,
    Item,
    MessageItem,
    OutputDetails,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseBody,
    ResponsesRequest,
    ResponseUsage,
)
from minivllm.entrypoints.openai.responses.store import ResponseStore
from minivllm.entrypoints.openai.sse import NamedEventStream
from minivllm.exceptions import EngineGenerateError, RequestError, UnsupportedError
from minivllm.tool_parsers.pieces import CallArguments, CallEnd, CallStart, Content, Piece, Reasoning

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from minivllm.entrypoints.openai.chat_completion.serving import ServingChat

# The engine's reason of an end -> the answer's status; any other is "completed".
_STATUSES = {"length": "incomplete", "abort": "cancelled"}


class ServingResponses:
    def __init__(
        self, chat: ServingChat, lifecycle: Lifecycle, keep_alive_s: float, *, stores: bool = True
    ) -> None:
        """stores: keep answers for later requests; not where those may reach another process."""
        self._stores = stores
        self._chat = chat
        self._lifecycle = lifecycle
        self._keep_alive_s = keep_alive_s
        self._store = ResponseStore()

    async def create(self, request: ResponsesRequest, raw_request: Request) -> Response:
        """Answer one request, whole or as a stream.

        Raises:
            RequestError: the request is wrong; EngineError: it failed before its first event.
        """
        messages = input_messages(request.input)
        if not self._stores and request.previous_response_id is not None:
            raise UnsupportedError(
                "previous_response_id is not supported with several API servers; send the conversation as input",
                param="previous_response_id",
            )
        if request.previous_response_id is not None:
            previous = self._store.get(request.previous_response_id, param="previous_response_id")
            messages = previous.messages + messages
        asked = to_chat(request, messages)
        body = _begin(request)
        body.store = body.store and self._stores
        try:
            job = await self._chat.begin(asked, raw_request, api="responses")
            body.model = job.answering.model
            maker = _Maker(body)
            events = self._events(job, maker, messages)
            if not request.stream:
                async for _ in events:
                    pass
                return json_response(body)
            stream = NamedEventStream(
                events,
                request_id=body.id,
                lifecycle=self._lifecycle,
                keep_alive_s=self._keep_alive_s,
                failure=maker.failed,
            )
            return await stream.start()
        except RequestError as error:
            raise renamed(error, NAMES) from None

    async def _events(
        self, job: ChatJob, maker: _Maker, messages: list[dict[str, Any]]
    ) -> AsyncGenerator[Event, None]:
        """The answer's events; at their end its body is whole, and kept."""
        begun = False
        async with contextlib.aclosing(job.deltas()) as deltas:
            async for delta in deltas:
                if not begun:
                    begun = True
                    for event in maker.begin():
                        yield event
                for event in maker.add(delta):
                    yield event
        for event in maker.finish(job.usage()):
            if event.response is not None:
                self._keep(maker.body, messages)
            yield event

    def _keep(self, body: ResponseBody, messages: list[dict[str, Any]]) -> None:
        if body.store:
            self._store.put(body, messages + output_messages(body.output))

    def retrieve(self, response_id: str, stream: bool) -> Response:
        """Raises:
        NotFoundError: it is not stored. UnsupportedError: its events are asked for, which are not.
        """
        stored = self._store.get(response_id)
        if stream:
            raise UnsupportedError("events of a stored response are not kept; get it without stream", param="stream")
        return json_response(stored.body)

    def delete(self, response_id: str) -> Response:
        """Raises:
        NotFoundError: it is not stored.
        """
        self._store.delete(response_id)
        return json_response(Deleted(response_id))

    def cancel(self, response_id: str) -> Response:
        """Raises:
        RequestError: always: only a response in the background could be cancelled.
        """
        self._store.get(response_id)
        raise RequestError("only responses with background=true can be cancelled; close a stream to end it")


def _begin(request: ResponsesRequest) -> ResponseBody:
    return ResponseBody(
        id=f"resp_{request.request_id or uuid.uuid4().hex}",
        created_at=int(time.time()),
        model=request.model or "",
        output=[],
        instructions=request.instructions,
        metadata=request.metadata or {},
        previous_response_id=request.previous_response_id,
        max_output_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_logprobs=request.top_logprobs,
        tools=request.tools or [],
        tool_choice=request.tool_choice or "auto",
        parallel_tool_calls=request.parallel_tool_calls is not False,
        reasoning=request.reasoning,
        text=request.text or {"format": {"type": "text"}},
        store=request.store is not False,
    )


def _usage(usage: Usage) -> ResponseUsage:
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    reasoning = usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else 0
    return ResponseUsage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        InputDetails(cached),
        OutputDetails(reasoning),
    )


class _Maker:
    """Pieces of an answer to items, and to the events that tell of them: an item is open while its pieces come."""

    def __init__(self, body: ResponseBody) -> None:
        self.body = body
        self._num_events = 0
        self._finish_reason: str | None = None
        self._untold: list[Any] = []  # logprobs of tokens whose text has not come

    def _event(self, kind: str, **fields: Any) -> Event:
        event = Event(f"response.{kind}", self._num_events, **fields)
        self._num_events += 1
        return event

    def begin(self) -> list[Event]:
        # A stream's events show the body as it then was, and it goes on changing.
        return [self._event(kind, response=copy.deepcopy(self.body)) for kind in ("created", "in_progress")]

    def add(self, delta: AnswerDelta) -> list[Event]:
        self._untold += to_builtins(delta.text_logprobs)
        self._finish_reason = delta.finish_reason or self._finish_reason
        return [event for piece in delta.pieces for event in self._piece(piece)]

    def _piece(self, piece: Piece) -> list[Event]:
        if isinstance(piece, CallStart):
            self._untold = []  # of the call's tokens, which are no text
            return self._open(CallItem(_id("fc"), piece.id, piece.name))
        if isinstance(piece, CallArguments):
            item = self.body.output[-1]
            item.arguments += piece.text
            return [self._event("function_call_arguments.delta", **self._at(item), delta=piece.text)]
        if isinstance(piece, CallEnd):
            return self._close("completed" if piece.complete else "incomplete")
        if isinstance(piece, Reasoning):
            events = self._into(ReasoningItem, lambda: ReasoningItem(_id("rs"), []), ReasoningText(""))
            return [*events, self._add_text("reasoning_text.delta", piece.text)]
        assert isinstance(piece, Content)
        events = self._into(MessageItem, lambda: MessageItem(_id("msg"), []), OutputText(""))
        logprobs, self._untold = self._untold, []
        event = self._add_text("output_text.delta", piece.text, logprobs=logprobs)
        self.body.output[-1].content[0].logprobs += logprobs
        return [*events, event]

    def _add_text(self, kind: str, text: str, **fields: Any) -> Event:
        item = self.body.output[-1]
        item.content[0].text += text
        return self._event(kind, **self._at(item), content_index=0, delta=text, **fields)

    def _at(self, item: Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": len(self.body.output) - 1}

    def _into(self, kind: type, make: Callable[[], Item], part: OutputText | ReasoningText) -> list[Event]:
        """Be in an item of this kind: go on with the open one, or open one."""
        output = self.body.output
        if output and isinstance(output[-1], kind) and output[-1].status == "in_progress":
            return []
        item = make()
        events = self._open(item)
        item.content.append(part)
        return [*events, self._event("content_part.added", **self._at(item), content_index=0, part=copy.deepcopy(part))]

    def _open(self, item: Item) -> list[Event]:
        events = self._close("completed")
        self.body.output.append(item)
        index = len(self.body.output) - 1
        return [*events, self._event("output_item.added", output_index=index, item=copy.deepcopy(item))]

    def _close(self, status: str) -> list[Event]:
        if not self.body.output or self.body.output[-1].status != "in_progress":
            return []
        item = self.body.output[-1]
        item.status = status
        at, events = self._at(item), []
        if isinstance(item, CallItem):
            events.append(
                self._event("function_call_arguments.done", **at, arguments=item.arguments, name=item.name)
            )
        else:
            (part,) = item.content
            if isinstance(item, MessageItem):
                events.append(
                    self._event(
                        "output_text.done", **at, content_index=0, text=part.text, logprobs=part.logprobs
                    )
                )
            else:
                events.append(self._event("reasoning_text.done", **at, content_index=0, text=part.text))
            events.append(self._event("content_part.done", **at, content_index=0, part=part))
        return [*events, self._event("output_item.done", output_index=at["output_index"], item=item)]

    def finish(self, usage: Usage) -> list[Event]:
        """The answer is over.

        Raises:
            EngineGenerateError: it never finished.
        """
        if self._finish_reason is None:
            raise EngineGenerateError("the engine ended before its answer was finished")
        status = _STATUSES.get(self._finish_reason, "completed")
        if self.body.output and isinstance(item := self.body.output[-1], MessageItem):
            item.content[0].logprobs += self._untold
        # A cut message is incomplete; so is a cut call, which its own end has said.
        events = self._close("completed" if status == "completed" else "incomplete")
        self.body.status = status
        if self._finish_reason == "length":
            self.body.incomplete_details = {"reason": "max_output_tokens"}
        self.body.usage = _usage(usage)
        return [*events, self._event("completed" if status == "completed" else "incomplete", response=self.body)]

    def failed(self, error: BaseException) -> Event:
        """The answer ends with an error."""
        info = error_info(error)
        self.body.status = "failed"
        code = "server_error" if info.code >= 500 else "invalid_prompt"  # the nearest of those OpenAI has
        self.body.error = {"code": code, "message": info.message}
        return self._event("failed", response=self.body)


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
