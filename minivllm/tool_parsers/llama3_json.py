"""Llama 3.1 to 4: {"name": …, "parameters": …}, several with ; between, perhaps behind <|python_tag|>."""

from __future__ import annotations

from minivllm.tool_parsers.abstract import CallFormat
from minivllm.tool_parsers.json_calls import JsonToolParser
from minivllm.utils.text_source import Reading

TAG = "<|python_tag|>"


class Llama3JsonToolParser(JsonToolParser):
    """Without marks around it, JSON is a call only where an answer begins, and only with its arguments."""

    needs_special_tokens = True
    name_is_enough = False
    call_format = CallFormat('{"name": ', ', "parameters": ', "}", separator="; ")

    def read(self) -> Reading[None]:
        yield from self.attempt_at_beginning("{", self.objects_with_separator(";"))
        while (yield from self.source.until(TAG, emit=self.content))[1]:
            yield from self.attempt(self._calls(), before=TAG)

    def _calls(self) -> Reading[None]:
        yield from self.source.spaces()
        yield from self.objects_with_separator(";")
