"""minivllm: an LLM serving engine in the shape of vLLM V1. Each public name is imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from minivllm.version import __version__

if TYPE_CHECKING:
    from minivllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from minivllm.engine.async_llm import AsyncLLM
    from minivllm.engine.llm_engine import LLMEngine
    from minivllm.engine.processor import EmbedsPrompt, TextPrompt, TokensPrompt
    from minivllm.entrypoints.llm import LLM
    from minivllm.logits_processors import LogitsProcessor
    from minivllm.models.registry import ModelRegistry
    from minivllm.outputs import BeamSearchOutput, CompletionOutput, RequestOutput
    from minivllm.sampling_params import BeamSearchParams, SamplingParams
    from minivllm.utils.box_model import box_draft_model_path, box_model_path

_MODULE_OF = {
    "LLM": "minivllm.entrypoints.llm",
    "SamplingParams": "minivllm.sampling_params",
    "BeamSearchParams": "minivllm.sampling_params",
    "BeamSearchOutput": "minivllm.outputs",
    "AsyncLLM": "minivllm.engine.async_llm",
    "LLMEngine": "minivllm.engine.llm_engine",
    "EngineArgs": "minivllm.engine.arg_utils",
    "AsyncEngineArgs": "minivllm.engine.arg_utils",
    "RequestOutput": "minivllm.outputs",
    "CompletionOutput": "minivllm.outputs",
    "EmbedsPrompt": "minivllm.engine.processor",
    "TextPrompt": "minivllm.engine.processor",
    "TokensPrompt": "minivllm.engine.processor",
    "ModelRegistry": "minivllm.models.registry",
    "LogitsProcessor": "minivllm.logits_processors",
    "box_draft_model_path": "minivllm.utils.box_model",
    "box_model_path": "minivllm.utils.box_model",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbedsPrompt",
    "EngineArgs",
    "LLMEngine",
    "LogitsProcessor",
    "ModelRegistry",
    "RequestOutput",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
    "box_draft_model_path",
    "box_model_path",
]


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
