"""Which architectures are served, and where their code is. Imports no torch: front ends check names here."""

from __future__ import annotations

import importlib
from typing import Any

from minivllm.exceptions import ModelFilesError

# architecture in config.json -> "module:Class"
_MODELS: dict[str, str] = {
    "Gemma2ForCausalLM": "minivllm.models.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "minivllm.models.gemma3:Gemma3ForCausalLM",
    "LlamaForCausalLM": "minivllm.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "minivllm.models.mistral:MistralForCausalLM",
    "Qwen2ForCausalLM": "minivllm.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "minivllm.models.qwen3:Qwen3ForCausalLM",
}


class ModelRegistry:
    """The table of architectures. A model of your own joins it by `register_model`, an ordinary call."""

    @staticmethod
    def register_model(architecture: str, target: str | type) -> None:
        """Serve `architecture` with `target`: a class, or "module:Class", imported by the worker's process.

        Raises:
            ValueError: no other process could import the target.
        """
        if isinstance(target, type):
            target = f"{target.__module__}:{target.__qualname__}"
        if ":" not in target or target.startswith("__main__:"):
            raise ValueError(f"target {target!r} must be a class of a module that can be imported, or module:Class")
        _MODELS[architecture] = target

    @staticmethod
    def supported_architectures() -> list[str]:
        return sorted(_MODELS)

    @staticmethod
    def target(architecture: str) -> str:
        """Where the code of an architecture is, as "module:Class".

        Raises:
            ModelFilesError: the architecture is not served.
        """
        if architecture not in _MODELS:
            raise ModelFilesError(
                f"architecture {architecture} in config.json is not served; these are: "
                f"{', '.join(ModelRegistry.supported_architectures())}"
            )
        return _MODELS[architecture]


def load_class(target: str) -> Any:
    """The class at "module:Class"; imports torch.

    Raises:
        ModelFilesError: there is no such class.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelFilesError(f"the model class {target} cannot be imported: {error}") from error
