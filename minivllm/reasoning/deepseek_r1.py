"""DeepSeek R1 and models made after it: reasoning comes first, with or without <think>, and </think> ends it."""

from __future__ import annotations

from minivllm.reasoning.tagged import TaggedReasoningParser


class DeepSeekR1ReasoningParser(TaggedReasoningParser):
    start_text, end_text = "<think>", "</think>"
    begins_open = True
