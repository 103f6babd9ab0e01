"""Answers that a grammar holds to JSON, where the model's own way of calling is unknown or has no grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minivllm.tool_parsers.json_calls import JsonToolParser
from minivllm.utils.text_source import Reading


class JsonListToolParser(JsonToolParser):
    """The answer is a JSON list of calls."""

    def read(self) -> Reading[None]:
        spaces = yield from self.source.spaces()
        yield from self.attempt(self.call_list(), before=spaces)
        yield from self.source.until("\0", emit=self.content)


class ArgumentsToolParser(JsonToolParser):
    """The answer is the arguments of one function, whose name is known."""

    def __init__(self, tools: Sequence[dict[str, Any]] | None, function: str) -> None:
        super().__init__(tools)
        self._function = function

    def read(self) -> Reading[None]:
        spaces = yield from self.source.spaces()
        yield from self.attempt(self._call(), before=spaces)
        yield from self.source.until("\0", emit=self.content)

    def _call(self) -> Reading[None]:
        self.name(self._function)
        yield from self.json_arguments()
