"""What every request passes before its route. Plain ASGI: bodies are counted, streamed chunks not touched.

    RootPath ─▶ CORS ─▶ RequestId ─▶ HttpMetrics ─▶ Failures ─▶ --middleware ─▶ Authentication ─▶ Admission
        ─▶ BodyLimit ─▶ short_way.ShortWay ─▶ routes
"""

from __future__ import annotations

import hashlib
import hmac
import inspect
import uuid
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from minivllm.entrypoints.openai.errors import ServerClosingError, error_response
from minivllm.entrypoints.openai.lifecycle import Lifecycle
from minivllm.exceptions import ConfigError
from minivllm.metrics.http import content_length

MAX_BODY_BYTES = 64 << 20
MAX_ID_CHARS = 256
# What probes and scrapers call, without a key; --protect-metrics closes the last.
OPEN_PATHS = frozenset({"/health", "/ping", "/metrics"})


class RootPath:
    """Tells the app the prefix that a proxy has before its paths, kept or stripped. Outermost: keys depend on it."""

    def __init__(self, app: Any, path: str) -> None:
        self.app = app
        self._path = path.rstrip("/")  # with it, Starlette would find no route behind the prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            scope["root_path"] = self._path
        await self.app(scope, receive, send)


class RequestId:
    """Gives every request an id, its own X-Request-Id or a new one, and sends it back: always, or with errors only.

    It stands in the scope as "minivllm.request_id", and once an answer has begun, its status as "minivllm.status" and
    the length that it announces as "minivllm.num_bytes": those inside need not watch every message of a stream for
    them. A header that is too long or not printable is not taken.
    """

    def __init__(self, app: Any, *, always: bool) -> None:
        self.app = app
        self._always = always

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        fits = 1 <= len(given) <= MAX_ID_CHARS and given.isprintable()
        request_id = scope["minivllm.request_id"] = given if fits else uuid.uuid4().hex

        async def with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                scope["minivllm.status"] = message["status"]
                scope["minivllm.num_bytes"] = content_length(message.get("headers", ()))
                if self._always or message["status"] >= 400:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, with_id)


class Authentication:
    """Keys on every route but the open ones: `Authorization: Bearer KEY`, or as Anthropic's clients `x-api-key: KEY`.

    open_paths: routed paths that need none.
    """

    def __init__(self, app: Any, keys: Iterable[str], open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket" and not self._has_key(scope):
            await send({"type": "websocket.close", "code": 1008})  # before accept: HTTP 403
        elif scope["type"] == "http" and not self._admits(scope):
            headers = {"WWW-Authenticate": "Bearer"}
            refusal = HTTPException(401, "this server needs a key; send the header Authorization: Bearer <key>")
            await error_response(refusal, headers, scope=scope)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _admits(self, scope: Any) -> bool:
        return scope["method"] == "OPTIONS" or route_path(scope) in self._open_paths or self._has_key(scope)

    def _has_key(self, scope: Any) -> bool:
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        bearer = self._is_key(key.strip())
        return bearer and scheme.lower() == b"bearer" or self._is_key(headers.get(b"x-api-key", b"").strip())

    def _is_key(self, key: bytes) -> bool:
        digest = hashlib.sha256(key).digest()  # bytes, as sent: a key need not be ASCII
        # Every key is compared, in constant time: how long it takes tells nothing.
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def route_path(scope: Any) -> str:
    """The path that is routed: the request's own, without --root-path. Never a URL built from the Host header."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    if path == root:
        return "/"  # which the page's address without its slash is redirected to
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


class BodyLimit:
    """Refuses a body of more than MAX_BODY_BYTES before it is in memory, whether or not its length is announced."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
            refusal = _too_large()
            await error_response(refusal, dict(refusal.headers), scope=scope)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Any:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise _too_large()
            return message

        await self.app(scope, counted, send)


def _too_large() -> HTTPException:
    # What is left of the body is not read, so the connection cannot be used again.
    message = f"the body has more than {MAX_BODY_BYTES} bytes; send several requests"
    return HTTPException(413, message, {"Connection": "close"})


class Admission:
    """Counts open work, and refuses new work once the server drains."""

    def __init__(self, app: Any, lifecycle: Lifecycle) -> None:
        self.app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif self._lifecycle.draining:
            refusal = error_response(ServerClosingError(), {"Connection": "close"}, scope=scope)
            await refusal(scope, receive, send)
        else:
            with self._lifecycle.open_request():
                scope["minivllm.at_end"] = at_end = []  # what handlers want done once the last byte is sent
                try:
                    await self.app(scope, receive, send)
                finally:
                    for call in at_end:
                        call()


def load_middleware(import_path: str) -> type | Callable[..., Any]:
    """The class or coroutine function of one --middleware.

    Raises:
        ConfigError: there is no such thing, or it is neither.
    """
    module_name, _, name = import_path.replace(":", ".").rpartition(".")
    try:
        found = getattr(import_module(module_name), name)
    except Exception as error:
        raise ConfigError(f"--middleware {import_path} cannot be imported: {error}; give module.Class") from error
    if not inspect.isclass(found) and not inspect.iscoroutinefunction(found):
        raise ConfigError(f"--middleware {import_path} is neither a class nor an async function (request, call_next)")
    return found
