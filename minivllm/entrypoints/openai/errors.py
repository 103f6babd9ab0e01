"""What a client sees when something fails: vLLM's JSON body and status codes, and Anthropic's on its routes.

Owns the mapping from exceptions to bodies; routes and streams raise, and never build a body themselves. A status has
one spelling of `type`, whoever found the fault, and `param` names the field as the client wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from minivllm.exceptions import EngineError, MinivllmError, RequestError
from minivllm.logger import init_logger

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = init_logger(__name__)

MAX_LISTED_ERRORS = 10
MAX_SHOWN_INPUT = 60  # characters
MAX_MESSAGE_CHARS = 1000  # a message may quote the request
ANTHROPIC_PATH = "/v1/messages"
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# What an exception from the engine may carry and a client need not see: addresses and absolute paths.
_PRIVATE = re.compile(r"0x[0-9a-fA-F]{4,}|(?<![\w.])(?:[a-z]+://)?/(?:[\w.@+-]+/)+[\w.@+-]*")


class ServerClosingError(EngineError):
    """The server stops: it takes no new requests and ends those that are open."""

    status = 503

    def __init__(
        self, message: str = "the server is shutting down; send the request again elsewhere or later"
    ) -> None:
        super().__init__(message)


class ErrorInfo(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(msgspec.Struct):
    error: ErrorInfo


class AnthropicErrorInfo(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct, tag_field="type", tag="error"):
    error: AnthropicErrorInfo
    request_id: str | None = None


_encode = msgspec.json.Encoder().encode


def error_info(error: BaseException) -> ErrorInfo:
    """The body of any exception; what is not raised on purpose says nothing of its inside."""
    info = _info(error)
    info.message = _quotable(info.message)
    info.param = None if info.param is None else _quotable(info.param)
    return info


def _quotable(text: str) -> str:
    """Of what may come from the request: not all if it is long, and no half of a surrogate pair."""
    text = text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "…"
    return text.encode("utf-8", "replace").decode()


def _info(error: BaseException) -> ErrorInfo:
    if isinstance(error, RequestError):
        return _of_status(error.status, error.message, error.param)
    if isinstance(error, EngineError):
        return _of_status(error.status, _PRIVATE.sub("…", str(error)))
    if isinstance(error, RequestValidationError):
        return _validation_info(error)
    if isinstance(error, HTTPException):
        return _of_status(error.status_code, str(error.detail))
    return _of_status(500, "internal error; the server's log has the cause")


def _of_status(status: int, message: str, param: str | None = None) -> ErrorInfo:
    return ErrorInfo(message, _TYPES.get(status) or HTTPStatus(status).phrase, param, status)


def renamed(error: RequestError, names: dict[str, str]) -> RequestError:
    """The error with its field's name as the client wrote it."""
    head, dot, rest = (error.param or "").partition(".")
    if head in names:
        error.param = names[head] + dot + rest
        error.message = error.message.replace(head, names[head])
    return error


def error_body(error: BaseException) -> bytes:
    return _encode(ErrorResponse(error_info(error)))


def anthropic_error(error: BaseException, request_id: str | None = None) -> AnthropicError:
    """The body of any exception, as Anthropic's clients read it; a field is named in the message."""
    info = error_info(error)
    kind = _ANTHROPIC_TYPES.get(info.code) or ("invalid_request_error" if info.code < 500 else "api_error")
    message = info.message if not info.param or info.param in info.message else f"{info.param}: {info.message}"
    return AnthropicError(AnthropicErrorInfo(kind, message), request_id)


def error_response(
    error: BaseException, headers: dict[str, str] | None = None, *, scope: Mapping[str, Any]
) -> Response:
    """scope: of the request, whose path decides the shape."""
    info = error_info(error)
    body: msgspec.Struct = ErrorResponse(info)
    if f"{scope['path']}/".endswith((f"{ANTHROPIC_PATH}/", f"{ANTHROPIC_PATH}/count_tokens/")):
        body = anthropic_error(error, scope.get("minivllm.request_id"))
    headers = dict(headers or {})
    if info.code == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "1"
    return Response(_encode(body), info.code, headers, media_type="application/json")


def _validation_info(error: RequestValidationError) -> ErrorInfo:
    errors = error.errors()
    lines = [_validation_line(entry) for entry in errors[:MAX_LISTED_ERRORS]]
    if len(errors) > MAX_LISTED_ERRORS:
        lines.append("…")
    count = f"{len(errors)} validation error{'s' if len(errors) != 1 else ''}"
    param = _location(errors[0]) if errors else None
    return _of_status(400, "\n".join([f"{count}:", *lines]), param)


def _location(entry: dict[str, Any]) -> str:
    """The field as the client wrote it: without FastAPI's "body" before it."""
    loc = [str(part) for part in entry.get("loc", ())]
    if entry.get("type") == "json_invalid":  # then it is a place in the body, no field
        return loc[0]
    return ".".join(loc[1:] if loc[:1] == ["body"] and len(loc) > 1 else loc)


def _validation_line(entry: dict[str, Any]) -> str:
    line = f"  {_location(entry)}: {entry.get('msg', 'is not valid')}"
    if entry.get("type") == "json_invalid":
        line += f" at character {entry['loc'][-1]}"
    if "error" in entry.get("ctx", {}):
        line += f" ({entry['ctx']['error']})"
    given = entry.get("input")
    if isinstance(given, (str, int, float)) and entry.get("type") != "missing":
        shown = repr(given)
        line += f", got {shown if len(shown) <= MAX_SHOWN_INPUT else shown[:MAX_SHOWN_INPUT] + '…'}"
    return line


# What is raised on purpose, by us, FastAPI or Starlette.
HANDLED = (MinivllmError, RequestValidationError, HTTPException)


async def answer_error(request: Request, error: Exception) -> Response:
    """What a client hears of an error, on whichever way its request came to it."""
    if isinstance(error, HTTPException):
        return _answer_http_error(request, error)
    if isinstance(error, EngineError):
        logger.error("%s %s failed: %s", request.method, request.scope["path"], error)
    return _respond(request, error)


def _respond(request: Request, error: Exception, headers: dict[str, str] | None = None) -> Response:
    if getattr(request.app.state, "log_error_stack", False):
        logger.error("%s %s is answered with an error", request.method, request.scope["path"], exc_info=error)
    return error_response(error, headers, scope=request.scope)


def _answer_http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == HTTPStatus.NOT_FOUND and error.detail == HTTPStatus.NOT_FOUND.phrase:
        error = HTTPException(404, f"there is no route {request.scope['path'][:200]}; GET /docs lists them")
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{request.scope['path']} does not answer {request.method}"
        error = HTTPException(405, detail, error.headers)
    return _respond(request, error, dict(error.headers or {}))


class Failures:
    """Answers with a 500 what no handler knows. Inside `middleware.RequestId`, which says whether an answer has begun.

    Starlette's own way raises it again once answered, and uvicorn then cuts a connection that the client believes to
    be kept alive.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http" or "minivllm.status" in scope:
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await error_response(error, scope=scope)(scope, receive, send)


def install_error_handlers(app: FastAPI) -> None:
    """Give every failure of every route, routing itself included, the one body."""
    for kind in (*HANDLED, Exception):
        app.add_exception_handler(kind, answer_error)
