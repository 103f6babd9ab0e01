"""Llama 3.2, ToolACE and others: an answer that is a Python list of calls."""

from __future__ import annotations

from minivllm.tool_parsers.python_calls import PythonToolParser
from minivllm.utils.text_source import Reading


class PythonicToolParser(PythonToolParser):
    """Without marks around it, a list is one of calls only where an answer begins."""

    def read(self) -> Reading[None]:
        yield from self.attempt_at_beginning("[", self.call_list())
        yield from self.source.until("\0", emit=self.content)
