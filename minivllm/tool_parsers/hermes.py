"""Hermes 2, Qwen 2.5 and 3, and others: <tool_call>{"name": …, "arguments": …}</tool_call>, any number of them."""

from __future__ import annotations

from minivllm.tool_parsers.abstract import CallFormat
from minivllm.tool_parsers.json_calls import JsonToolParser
from minivllm.utils.text_source import Reading

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesToolParser(JsonToolParser):
    needs_special_tokens = True  # in some of these vocabularies the marks are
    call_format = CallFormat(BEGIN + '\n{"name": ', ', "arguments": ', "}\n" + END, separator="\n", trigger=BEGIN)

    def read(self) -> Reading[None]:
        while (yield from self.source.until(BEGIN, emit=self.content))[1]:
            if (yield from self.attempt(self._call(), before=BEGIN)):
                yield from self.closing(END)

    def _call(self) -> Reading[None]:
        yield from self.source.spaces()
        yield from self.call_object()
