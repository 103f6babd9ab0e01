"""Granite 3: <|tool_call|> or <tool_call>, then a JSON list of calls."""

from __future__ import annotations

from minivllm.tool_parsers.abstract import CallFormat
from minivllm.tool_parsers.json_calls import JsonToolParser
from minivllm.utils.text_source import Reading

BEGINS = ("<|tool_call|>", "<tool_call>")  # 3.0 has the first as a token, later ones write the second


class GraniteToolParser(JsonToolParser):
    needs_special_tokens = True
    call_format = CallFormat(
        '{"name": ', ', "arguments": ', "}", separator=", ", first=BEGINS[0] + "[", last="]", trigger=BEGINS[0]
    )

    def read(self) -> Reading[None]:
        while (found := (yield from self.source.until(*BEGINS, emit=self.content)))[1]:
            yield from self.attempt(self._calls(), before=found[1])

    def _calls(self) -> Reading[None]:
        yield from self.source.spaces()
        yield from self.one_or_list()
