"""The short way from the middleware to a route that takes one JSON body: no matching of paths, no dependencies.

FastAPI's way costs as much as all else that is done to begin a request. If nothing is wrong, little of it is needed
here: have the body checked, call the handler. Whatever else there is goes FastAPI's way, wrong bodies too, which are
given back to it: what is wrong with one is said in one place.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from minivllm.entrypoints.openai.errors import HANDLED, answer_error
from minivllm.entrypoints.openai.middleware import route_path
from minivllm.entrypoints.openai.utils import JsonRequest, is_json

Receive = Callable[[], Awaitable[Any]]


class ShortWay:
    """The innermost middleware."""

    def __init__(self, app: Any, routes: Iterable[APIRoute]) -> None:
        """routes: of POST, with `require_json` as their one dependency, and handlers of (request, raw_request)."""
        self.app = app
        self._routes = {route.path: (route, _body_model(route)) for route in routes}

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        # FastAPI's own telemetry, where an operator has set that up, learns the route on its way.
        if scope["type"] != "http" or scope["method"] != "POST" or "fastapi.telemetry" in scope:
            await self.app(scope, receive, send)
            return
        route, model = self._routes.get(route_path(scope), (None, None))
        raw_request = JsonRequest(scope, receive)
        if route is None or not is_json(raw_request):
            await self.app(scope, receive, send)
            return
        scope["route"], scope["endpoint"], scope["path_params"] = route, route.endpoint, {}
        try:
            request = model.model_validate(await raw_request.json())
            response = await route.endpoint(request=request, raw_request=raw_request)
        except (json.JSONDecodeError, ValidationError):
            await self.app(scope, _again(await raw_request.body(), receive), send)
            return
        except ClientDisconnect:
            await self.app(scope, receive, send)
            return
        except HANDLED as error:
            response = await answer_error(raw_request, error)
        await response(scope, receive, send)


def _body_model(route: APIRoute) -> type[BaseModel]:
    return get_type_hints(route.endpoint)["request"]


def _again(body: bytes, receive: Receive) -> Receive:
    """The messages of a request whose body was read."""
    read = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return read.pop() if read else await receive()

    return receive_again
