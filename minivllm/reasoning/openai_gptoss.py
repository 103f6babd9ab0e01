"""gpt-oss (the harmony format): the analysis channel is reasoning. Calls are messages too: one reader reads all."""

from __future__ import annotations

from minivllm.reasoning.abstract import Encode, ReasoningParser
from minivllm.reasoning.counter import ReasoningCounter
from minivllm.tool_parsers.openai import OpenAIToolParser
from minivllm.tool_parsers.pieces import Reasoning
from minivllm.utils.text_source import Reading


class OpenAIGptOssReasoningParser(ReasoningParser):
    # The prompt ends with <|start|>assistant, so an answer may be in any channel; the final one comes last.
    start_text, end_text = "", "<|channel|>final<|message|>"
    begins_open = True
    read_by_tool_parser = "openai"

    @classmethod
    def counter(cls, encode: Encode, *, is_open: bool) -> ReasoningCounter:
        """Only the analysis counts: a call is no reasoning, though the final channel has not come."""
        start, end = encode("<|channel|>analysis<|message|>"), encode("<|end|>")
        return ReasoningCounter(start, end, is_open=False, anywhere=True)

    def read(self) -> Reading[None]:
        """Not used where `read_by_tool_parser` is heeded; the same text parted in two."""
        reader = OpenAIToolParser()
        while True:
            text, _ = self.source.unread, self.source.skip(len(self.source.unread))
            pieces = [*reader.feed(text), *(reader.finish() if self.source.ended else ())]
            for piece in pieces:
                (self.reason if isinstance(piece, Reasoning) else self.answer)(piece.text)
            if self.source.ended:
                return
            yield
