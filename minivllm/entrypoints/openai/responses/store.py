"""Answers that were asked to be kept, in memory: for GET, and for conversations that go on by id.

Bounded in number and in bytes, as text; the oldest goes first. It does not outlive its process, nor is it shared.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from minivllm.entrypoints.openai.responses.protocol import ResponseBody
from minivllm.exceptions import NotFoundError

MAX_RESPONSES = 1000
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """body: what GET answers. messages: the conversation up to it, its answer included."""

    body: ResponseBody
    messages: list[dict[str, Any]]
    num_bytes: int


class ResponseStore:
    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def put(self, body: ResponseBody, messages: list[dict[str, Any]]) -> None:
        self._drop(body.id)
        # The body repeats what the request says (metadata, tools, …) and may hold logprobs: it can be the larger part.
        num_bytes = len(str(messages)) + len(msgspec.json.encode(body))
        self._stored[body.id] = Stored(body, messages, num_bytes)
        self._num_bytes += num_bytes
        while len(self._stored) > self._max_responses or (self._num_bytes > self._max_bytes and self._stored):
            self._drop(next(iter(self._stored)))

    def get(self, response_id: str, *, param: str | None = None) -> Stored:
        """Raises:
        NotFoundError: it was never stored, or is no more.
        """
        if response_id not in self._stored:
            message = f"there is no stored response {response_id[:100]}; it may have been dropped"
            raise NotFoundError(message, param=param)
        self._stored.move_to_end(response_id)
        return self._stored[response_id]

    def delete(self, response_id: str) -> None:
        """Raises:
        NotFoundError: it is not there.
        """
        self.get(response_id)
        self._drop(response_id)

    def _drop(self, response_id: str) -> None:
        stored = self._stored.pop(response_id, None)
        self._num_bytes -= stored.num_bytes if stored else 0
