"""What every request passes before its route. Plain ASGI: nothing here touches a body or a streamed chunk."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from minivllm.entrypoints.openai.errors import ServerClosingError, error_response
from minivllm.entrypoints.openai.lifecycle import Lifecycle

OPEN_PATHS = frozenset({"/health", "/ping", "/metrics"})  # what probes and scrapers call, without a key


class Authentication:
    """Bearer keys on every route but OPEN_PATHS."""

    def __init__(self, app: Any, keys: Iterable[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

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
            or self._is_key(Headers(scope=scope).get("authorization", ""))
        )

    def _is_key(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # Every key is compared, in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _route_path(scope: Any) -> str:
    """The path that is routed: the request's own, without --root-path. Never a URL built from the Host header."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


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
