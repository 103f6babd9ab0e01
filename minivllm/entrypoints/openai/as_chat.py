"""Requests of other APIs as requests of chat: the prompt is the one that chat would render, the parameters are chat's.

What comes back are the pieces of chat's answers (`chat_completion/job.py`), which each API puts into its own bodies.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from minivllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from minivllm.entrypoints.openai.errors import renamed
from minivllm.exceptions import RequestError


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
