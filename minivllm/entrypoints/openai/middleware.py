"""What every request passes before its route. Plain ASGI: bodies are counted, streamed chunks not touched."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from minivllm.entrypoints.openai.errors import ServerClosingError, error_response
from minivllm.entrypoints.openai.lifecycle import Lifecycle

MAX_BODY_BYTES = 64 << 20
OPEN_PATHS = frozenset({"/health", "/ping", "/metrics"})  # what probes and scrapers call, without a key


class Authentication:
    """Bearer keys on every route but OPEN_PATHS."""

    def __init__(self, app: Any, keys: Iterable[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self._admits(scope):
            headers = {"WWW-Authenticate": "Bearer"}
            refusal = HTTPException(
                401, "this server needs a key; send the header Authorization: Bearer <key>"
            )
            await error_response(refusal, headers)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _admits(self, scope: Any) -> bool:
        return (
            scope["method"] == "OPTIONS"
            or _route_path(scope) in OPEN_PATHS
            or self._is_key(dict(scope["headers"]).get(b"authorization", b""))
        )

    def _is_key(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()  # bytes, as sent: a key need not be ASCII
        # Every key is compared, in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _route_path(scope: Any) -> str:
    """The path that is routed: the request's own, without --root-path. Never a URL built from the Host header."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
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
            await error_response(refusal, dict(refusal.headers))(scope, receive, send)
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
            await error_response(ServerClosingError(), {"Connection": "close"})(scope, receive, send)
        else:
            with self._lifecycle.open_request():
                await self.app(scope, receive, send)
