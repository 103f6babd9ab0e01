"""Fields of a request that nobody defines: accepted as vLLM does, but never in silence.

Each name is logged once, the response's X-Ignored-Fields has those of its request, and --strict-fields refuses them.
Fields that somebody does define and that we do not honour are not here: see `sampling_fields`.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from minivllm.exceptions import RequestError
from minivllm.logger import init_logger
from minivllm.utils.text import nearest

logger = init_logger(__name__)

MAX_NAMES = 20  # in a header
MAX_LOGGED = 1000  # different names in a server's life; names are the client's to choose
_FIT_FOR_HEADER = re.compile(r"[\w.\-]{1,64}", re.ASCII)


class IgnoredFields:
    """Of one server: what it does about them, and which its log has named. strict: refuse them."""

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._logged: set[str] = set()

    def of(self, request: Any) -> list[str]:
        """The names of a request's undefined fields that a header can carry, after logging each that is new.

        request: the body's model; anything else has no such fields.

        Raises:
            RequestError: there are some, and they are refused; the nearest defined name is told.
        """
        if not isinstance(request, BaseModel) or not request.model_extra:
            return []
        known = getattr(request, "KNOWN_ELSEWHERE", frozenset())
        unknown = sorted(name for name in request.model_extra if name not in known)
        if self._strict and unknown:
            guess = nearest(unknown[0][:200], [*type(request).model_fields, *known])
            hint = f"did you mean {guess}?" if guess else "leave it out"
            raise RequestError(f"there is no field {unknown[0][:200]}; {hint}", param=unknown[0][:200])
        shown = [name for name in unknown if _FIT_FOR_HEADER.fullmatch(name)][:MAX_NAMES]
        for name in shown:
            if name not in self._logged and len(self._logged) < MAX_LOGGED:
                self._logged.add(name)
                logger.warning("requests have a field %s, which is ignored: nobody defines it", name)
        return shown
