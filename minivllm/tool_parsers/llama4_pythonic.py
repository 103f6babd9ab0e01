"""Llama 4: a Python list of calls, where an answer begins or between <|python_start|> and <|python_end|>."""

from __future__ import annotations

from minivllm.tool_parsers.python_calls import PythonToolParser
from minivllm.utils.text_source import Reading

BEGIN, END = "<|python_start|>", "<|python_end|>"


class Llama4PythonicToolParser(PythonToolParser):
    needs_special_tokens = True

    def read(self) -> Reading[None]:
        yield from self.attempt_at_beginning("[", self.call_list())
        while (yield from self.source.until(BEGIN, emit=self.content))[1]:
            if (yield from self.attempt(self._calls(), before=BEGIN)):
                yield from self.closing(END)

    def _calls(self) -> Reading[None]:
        yield from self.source.spaces()
        yield from self.call_list()
