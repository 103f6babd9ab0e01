"""Fields that an API defines and this server does not act on: each with the values for which that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minivllm.exceptions import UnsupportedError

Accepts = Callable[[Any], bool]


def null(value: Any) -> bool:
    return value is None


def empty(value: Any) -> bool:
    return not value


def anything(value: Any) -> bool:
    return True


def one_of(*values: Any) -> Accepts:
    return lambda value: value in values


# Fields of each of OpenAI's APIs that cannot change the answer.
COMMON: dict[str, Accepts] = {
    "prompt_cache_key": anything,
    "prompt_cache_retention": anything,
    "safety_identifier": anything,
    "service_tier": one_of(None, "auto", "default"),
    "session_id": anything,
}


def refuse_others(fields: Mapping[str, Accepts], body: Mapping[str, Any]) -> None:
    """Raises UnsupportedError when one of these fields has a value that would change the answer."""
    for name in fields.keys() & body.keys():
        if not _holds(fields[name], body[name]):
            raise UnsupportedError(f"{name}={str(body[name])[:40]} is not supported; leave it out", param=name)


def _holds(accepts: Accepts, value: Any) -> bool:
    try:
        return accepts(value)
    except TypeError:  # unhashable, or no list
        return False
