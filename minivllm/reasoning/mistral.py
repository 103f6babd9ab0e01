"""Magistral: [THINK]…[/THINK], tokens of their own, before the answer and now and then within it."""

from __future__ import annotations

from minivllm.reasoning.tagged import TaggedReasoningParser


class MistralReasoningParser(TaggedReasoningParser):
    start_text, end_text = "[THINK]", "[/THINK]"
    anywhere = True
