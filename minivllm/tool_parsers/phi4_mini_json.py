"""Phi-4-mini: functools[{"name": …, "arguments": …}, …]"""

from __future__ import annotations

from minivllm.tool_parsers.abstract import CallFormat
from minivllm.tool_parsers.json_calls import JsonToolParser
from minivllm.utils.text_source import Reading

BEGIN = "functools["


class Phi4MiniJsonToolParser(JsonToolParser):
    needs_special_tokens = True
    call_format = CallFormat(
        '{"name": ', ', "arguments": ', "}", separator=", ", first=BEGIN, last="]", trigger=BEGIN
    )

    def read(self) -> Reading[None]:
        while (yield from self.source.until(BEGIN, emit=self.content))[1]:
            yield from self.attempt(self.call_list(opened=True), before=BEGIN)
