"""GLM 4.5 to 4.7: <think>…</think> before the answer, where the model thinks at all."""

from __future__ import annotations

from minivllm.reasoning.tagged import TaggedReasoningParser


class Glm45ReasoningParser(TaggedReasoningParser):
    start_text, end_text = "<think>", "</think>"
