"""Which parsers of tool calls there are, by the names of --tool-call-parser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minivllm.utils.class_table import ClassTable

if TYPE_CHECKING:
    from minivllm.tool_parsers.abstract import ToolParser

_PARSERS = {
    "deepseek_v3": "minivllm.tool_parsers.deepseek_v3:DeepSeekV3ToolParser",
    "deepseek_v31": "minivllm.tool_parsers.deepseek_v3:DeepSeekV3ToolParser",
    "glm45": "minivllm.tool_parsers.glm45:Glm45ToolParser",
    "granite": "minivllm.tool_parsers.granite:GraniteToolParser",
    "hermes": "minivllm.tool_parsers.hermes:HermesToolParser",
    "kimi_k2": "minivllm.tool_parsers.kimi_k2:KimiK2ToolParser",
    "llama3_json": "minivllm.tool_parsers.llama3_json:Llama3JsonToolParser",
    "llama4_json": "minivllm.tool_parsers.llama3_json:Llama3JsonToolParser",
    "llama4_pythonic": "minivllm.tool_parsers.llama4_pythonic:Llama4PythonicToolParser",
    "mistral": "minivllm.tool_parsers.mistral:MistralToolParser",
    "openai": "minivllm.tool_parsers.openai:OpenAIToolParser",
    "phi4_mini_json": "minivllm.tool_parsers.phi4_mini_json:Phi4MiniJsonToolParser",
    "pythonic": "minivllm.tool_parsers.pythonic:PythonicToolParser",
    "qwen3_coder": "minivllm.tool_parsers.qwen3_coder:Qwen3CoderToolParser",
    "qwen3_xml": "minivllm.tool_parsers.qwen3_coder:Qwen3CoderToolParser",
}

TOOL_PARSERS: ClassTable[ToolParser] = ClassTable(
    "--tool-call-parser", "minivllm.tool_parsers.abstract:ToolParser", _PARSERS
)
