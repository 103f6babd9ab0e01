"""Granite 3.2: "Here is my thought process:" … "Here is my response:", or "Here's" in place of "Here is"."""

from __future__ import annotations

from minivllm.reasoning.tagged import TaggedReasoningParser


class GraniteReasoningParser(TaggedReasoningParser):
    start_text, end_text = "Here is my thought process:", "Here is my response:"
    other_starts, other_ends = ("Here's my thought process:",), ("Here's my response:",)
    needs_special_tokens = False
