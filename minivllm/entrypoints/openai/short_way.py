"""The short way from the middleware to a route that takes one JSON body: no matching of paths, no dependencies.

FastAPI's way costs as much as all else that is done to begin a request. If nothing is wrong, little of it is needed
here: have the body checked, call the handler. Whatever else there is goes FastAPI's way, wrong bodies too, which are
given back to it: what is wrong with one is said in one place. Once the handler is called there is no way back, for it
has effects: what it raises is answered here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel

from minivllm.entrypoints.openai.errors import HANDLED, answer_error
from minivllm.entrypoints.openai.middleware import route_path
from minivllm.entrypoints.openai.utils import JsonRequest, is_json

Receive = Callable[[], Awaitable[Any]]


class ShortWay:
    """The innermost middleware."""

    def __init__(self, app: Any, routes: Iterable[APIRoute]) -> None:
        """routes: of POST, with `require_json` as their one dependency, and handlers of (request, raw_request) that
        return a whole response."""
        self.app = app
        self._routes = {route.path: (route, _body_model(route)) for route in routes}

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        route, model = self._route_of(scope)
        raw_request = JsonRequest(scope, receive)
        if route is None or not is_json(raw_request):
            await self.app(scope, receive, send)
            return
        scope["route"], scope["endpoint"], scope["path_params"] = route, route.endpoint, {}
        request, again = await _read(raw_request, model)
        if request is None:
            await self.app(scope, again, send)
            return
        try:
            response = await route.endpoint(request=request, raw_request=raw_request)
        except HANDLED as error:
            response = await answer_error(raw_request, error)
        await response(scope, receive, send)

    def _route_of(self, scope: Any) -> tuple[Any, Any]:
        """The route and its body's model; None if all of it must go FastAPI's way.

        FastAPI's own telemetry, where an operator has set that up, learns the route on that way; and who overrides
        dependencies, in an app of one's own, wants them called.
        """
        if scope["type"] != "http" or scope["method"] != "POST" or "fastapi.telemetry" in scope:
            return None, None
        if scope["app"].dependency_overrides:
            return None, None
        return self._routes.get(route_path(scope), (None, None))


async def _read(raw_request: JsonRequest, model: type[BaseModel]) -> tuple[BaseModel | None, Receive]:
    """The checked body; or None, and the messages with which FastAPI finds what is wrong, whatever that is."""
    receive = raw_request.receive
    try:
        body = await raw_request.body()
    except Exception as error:  # the client left, the body is too large, or what a middleware raises
        return None, _failing(error)
    try:
        return model.model_validate(await raw_request.json()), receive
    except Exception:
        return None, _again(body, receive)


def _body_model(route: APIRoute) -> type[BaseModel]:
    return get_type_hints(route.endpoint)["request"]


def _again(body: bytes, receive: Receive) -> Receive:
    """The messages of a request whose body was read."""
    read = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return read.pop() if read else await receive()

    return receive_again


def _failing(error: Exception) -> Receive:
    """The messages of a request whose body could not be read."""

    async def fail_again() -> Any:
        raise error

    return fail_again
