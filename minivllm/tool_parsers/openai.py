"""gpt-oss (the harmony format): messages with a channel and perhaps a recipient in their heads.

    <|channel|>analysis<|message|>…<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>

The analysis is reasoning, what goes to functions.* a call, and the rest content.
"""

from __future__ import annotations

import re

from minivllm.tool_parsers.abstract import Malformed, ToolParser
from minivllm.tool_parsers.pieces import Reasoning
from minivllm.utils.text_source import Reading

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MAX_HEAD_CHARS = 512
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


class OpenAIToolParser(ToolParser):
    needs_special_tokens = True

    def read(self) -> Reading[None]:
        # The prompt ends within a head, behind <|start|>assistant.
        in_head = (yield from self.source.peek(len(CHANNEL))).startswith((CHANNEL, START, " to="))
        while True:
            if in_head:
                yield from self.attempt(self._message())
            found = yield from self.source.until(START, CHANNEL, *ENDS, emit=self.content)
            if found[1] is None:
                return
            in_head = found[1] in (START, CHANNEL)

    def _message(self) -> Reading[None]:
        head, marker = yield from self.source.until(MESSAGE, limit=MAX_HEAD_CHARS)
        if marker is None:
            raise Malformed
        recipient = _RECIPIENT.search(head)
        if recipient is not None and self._parameters:
            self.name(recipient[1])
            yield from self.source.spaces()
            yield from self.json_arguments()
            yield from self.closing(*ENDS)
            return
        self.source.unmark()
        is_analysis = "analysis" in head and recipient is None
        yield from self.source.until(*ENDS, START, emit=self._reason if is_analysis else self.content)

    def _reason(self, text: str) -> None:
        self._found.append(Reasoning(text))
