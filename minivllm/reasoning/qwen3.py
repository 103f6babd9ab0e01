"""Qwen3: <think>…</think> before the answer, where the model thinks at all; the prompt may have the first mark."""

from __future__ import annotations

from minivllm.reasoning.tagged import TaggedReasoningParser


class Qwen3ReasoningParser(TaggedReasoningParser):
    start_text, end_text = "<think>", "</think>"
