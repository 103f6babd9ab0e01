"""What is put around a route's handler: its client's leaving, the server's closing, the load, how a body is read."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from minivllm.entrypoints.openai.errors import ServerClosingError
from minivllm.entrypoints.openai.lifecycle import Lifecycle
from minivllm.exceptions import RequestError
from minivllm.logger import init_logger
from minivllm.utils.json_depth import is_deeper

logger = init_logger(__name__)
T = TypeVar("T")
_END: Any = object()
CLIENT_CLOSED_REQUEST = 499
MAX_JSON_DEPTH = 128  # levels of objects and arrays; a JSON schema of a schema has a dozen
# How a body can hold half of a surrogate pair: escaped, as bytes of its own, or in UTF-16 and UTF-32, which have NULs.
_MAY_HOLD_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")


class ClientDisconnected(Exception):
    """Nobody waits for the answer any more."""


async def attend(
    work: Coroutine[Any, Any, T], receive: Callable[[], Awaitable[Any]], lifecycle: Lifecycle
) -> T:
    """Run `work` to its end, unless the client goes or the server closes first; then it is cancelled.

    It runs in the task of whoever calls, which is cancelled for it and goes on, as with `asyncio.timeout`.

    Raises:
        ClientDisconnected, ServerClosingError: what came first; whatever `work` raises.
    """
    end = _EarlyEnd()
    watcher = asyncio.ensure_future(_watch(receive, end))
    closing = lifecycle.on_close(lambda: end.come(ServerClosingError()))
    try:
        return await work
    except asyncio.CancelledError:
        if end.reason is None or end.is_cancelled_by_others():
            raise
        raise end.reason from None
    finally:
        watcher.cancel()
        lifecycle.forget(closing)
        end.settle()


class _EarlyEnd:
    """Cancels the task that makes it, once, and can take that back (from Python 3.11 on a task counts it)."""

    def __init__(self) -> None:
        self._task: Any = asyncio.current_task()
        self._num_cancels = self._count()
        self.reason: Exception | None = None

    def _count(self) -> int:
        return self._task.cancelling() if hasattr(self._task, "cancelling") else 0

    def come(self, reason: Exception) -> None:
        if self.reason is None:
            self.reason = reason
            self._task.cancel()

    def is_cancelled_by_others(self) -> bool:
        return self._count() > self._num_cancels + 1

    def settle(self) -> None:
        if self.reason is not None and hasattr(self._task, "uncancel"):
            self._task.uncancel()


async def _watch(receive: Callable[[], Awaitable[Any]], end: _EarlyEnd) -> None:
    """Wait for the client's going; a connection that cannot be read counts as gone."""
    with contextlib.suppress(Exception):
        while (await receive())["type"] != "http.disconnect":
            pass
    end.come(ClientDisconnected())


async def _cancel(task: asyncio.Future[Any]) -> None:
    """End a task whose outcome nobody asks for. One that failed is read too: asyncio logs errors never read."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


def with_cancellation(handler: Callable[..., Coroutine[Any, Any, Response]]) -> Callable[..., Any]:
    """Cancel a route's handler, and with it the engine's work, when its client disconnects.

    The handler must take its `Request` as `raw_request`. A stream it returns watches for itself. Fields of its
    `request` that nobody defines are named in the response, or refused with --strict-fields.
    """

    @functools.wraps(handler)
    async def attended(*args: Any, **kwargs: Any) -> Response:
        raw_request: Request = kwargs["raw_request"]
        state = raw_request.app.state
        ignored = state.ignored_fields.of(kwargs.get("request"))
        try:
            response = await attend(handler(*args, **kwargs), raw_request.receive, state.lifecycle)
            if ignored:
                response.raw_headers.append((b"x-ignored-fields", ", ".join(ignored).encode()))
            return response
        except ClientDisconnected:
            logger.info("aborted: the client of %s disconnected", raw_request.url.path)
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    return attended


def load_aware_call(handler: Callable[..., Coroutine[Any, Any, Response]]) -> Callable[..., Any]:
    """Count a route's requests for GET /load, from the call to the last byte, when the server tracks its load."""

    @functools.wraps(handler)
    async def counted(*args: Any, **kwargs: Any) -> Response:
        raw_request: Request = kwargs["raw_request"]
        state = raw_request.app.state
        if state.tracks_load:
            state.lifecycle.num_loading += 1
            raw_request.scope["minivllm.at_end"].append(state.lifecycle.unload)
        return await handler(*args, **kwargs)

    return counted


class JsonRequest(Request):
    """A request whose body is JSON of a bounded depth, and all of it Unicode.

    Half of a surrogate pair is refused wherever it stands: routes give back much of what they are sent, and no answer
    could be encoded that holds one.
    """

    async def json(self) -> Any:
        body = await self.body()
        try:
            value = json.loads(body)
        except json.JSONDecodeError:
            raise  # FastAPI says where
        except RecursionError:
            raise _too_deep() from None
        except ValueError as error:  # not UTF-8, or a number of thousands of digits
            raise HTTPException(400, f"the body cannot be read as JSON: {str(error)[:200]}") from None
        # Few bodies have that many brackets; only of those the depth is looked at.
        if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH and is_deeper(value, MAX_JSON_DEPTH):
            raise _too_deep()
        if _MAY_HOLD_SURROGATES.search(body):
            _check_unicode(value)
        return value


def _check_unicode(value: Any) -> None:
    """Raises:
    RequestError: half of a surrogate pair is in some text or name; `param` is its path.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        path, start = next(_lone_surrogates(value, ""))
        name = path.encode("utf-8", "replace").decode()
        raise RequestError(f"{name} is not Unicode: a lone surrogate at character {start}", param=name) from None


def _lone_surrogates(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """Where they are: the path of the text, or of the object's member, and the place in it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            yield path or "body", error.start
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _lone_surrogates(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            inner = f"{path}.{name}" if path else name
            yield from _lone_surrogates(name, inner)
            yield from _lone_surrogates(item, inner)


def _too_deep() -> HTTPException:
    return HTTPException(400, f"the body's JSON has more than {MAX_JSON_DEPTH} levels; send a flatter one")


class JsonRoute(APIRoute):
    """A route that reads its body as `JsonRequest` does. For `APIRouter(route_class=JsonRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            try:
                return await handle(JsonRequest(request.scope, request.receive))
            except HTTPException as error:  # FastAPI's, in place of what it does not know when it reads a body
                if isinstance(error.__cause__, RequestError):
                    raise error.__cause__ from None
                raise

        return handle_json


def _content_type(raw_request: Request) -> str:
    return raw_request.headers.get("content-type", "").split(";", 1)[0].strip().lower()


def is_json(raw_request: Request) -> bool:
    """Whether its body says so."""
    return _content_type(raw_request) == "application/json"


async def require_json(raw_request: Request) -> None:
    """A route's dependency: a body that does not say it is JSON is refused.

    Browsers send other content types across origins without asking first; this closes that door.
    """
    if not is_json(raw_request):
        raise RequestValidationError(
            [
                {
                    "type": "content_type",
                    "loc": ("header", "content-type"),
                    "msg": "Content-Type must be application/json",
                    "input": _content_type(raw_request),
                }
            ]
        )


def merge(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of several generators as they come; all are closed at the end.

    Raises whatever the first of them to fail raises; what others raise is dropped.
    """
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _merge(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    waiting: dict[asyncio.Task[T], AsyncGenerator[T, None]] = {}
    try:
        waiting = {asyncio.ensure_future(_next(stream)): stream for stream in streams}
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = waiting.pop(task)
                item = task.result()
                if item is not _END:
                    waiting[asyncio.ensure_future(_next(stream))] = stream
                    yield item
    finally:
        for task in waiting:
            await _cancel(task)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[T, None]) -> T:
    return await anext(stream, _END)
