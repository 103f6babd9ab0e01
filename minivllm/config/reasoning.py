"""Models that think before they answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningConfig:
    reasoning_parser: str = ""
    """How the model marks what it thinks: deepseek_r1, glm45, granite, mistral, openai_gptoss, qwen3, or a plug-in's
    name. Answers then have it apart, in `reasoning`."""
    reasoning_parser_plugin: str = ""
    """Python file that registers reasoning parsers: minivllm.reasoning.registry.REASONING_PARSERS.register(NAME)."""
