"""Which parsers of reasoning there are, by the names of --reasoning-parser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minivllm.utils.class_table import ClassTable

if TYPE_CHECKING:
    from minivllm.config.reasoning import ReasoningConfig
    from minivllm.reasoning.abstract import ReasoningParser

_PARSERS = {
    "deepseek_r1": "minivllm.reasoning.deepseek_r1:DeepSeekR1ReasoningParser",
    "glm45": "minivllm.reasoning.glm45:Glm45ReasoningParser",
    "granite": "minivllm.reasoning.granite:GraniteReasoningParser",
    "mistral": "minivllm.reasoning.mistral:MistralReasoningParser",
    "openai_gptoss": "minivllm.reasoning.openai_gptoss:OpenAIGptOssReasoningParser",
    "qwen3": "minivllm.reasoning.qwen3:Qwen3ReasoningParser",
}

REASONING_PARSERS: ClassTable[ReasoningParser] = ClassTable(
    "--reasoning-parser", "minivllm.reasoning.abstract:ReasoningParser", _PARSERS
)


def reasoning_parser_class(config: ReasoningConfig) -> type[ReasoningParser] | None:
    """The class that a configuration asks for, its plug-in imported; None: it asks for none.

    Raises:
        ConfigError: there is no such parser, or the plug-in fails.
    """
    if config.reasoning_parser_plugin:
        REASONING_PARSERS.import_plugin(config.reasoning_parser_plugin)
    return REASONING_PARSERS.get(config.reasoning_parser) if config.reasoning_parser else None
