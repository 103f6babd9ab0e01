"""Qwen2 and Qwen2.5 (arXiv:2407.10671): a bias on q, k and v, always, and windows on the layers that have one."""

from __future__ import annotations

from minivllm.config.hf_config import HFConfig
from minivllm.exceptions import ModelFilesError
from minivllm.models.decoder import DecoderForCausalLM, Variant

_WINDOWED = {"full_attention": False, "sliding_attention": True}


class Qwen2ForCausalLM(DecoderForCausalLM):
    @staticmethod
    def variant(config: HFConfig) -> Variant:
        return Variant(sliding_windows=sliding_windows(config), qkv_bias=True)


def sliding_windows(config: HFConfig) -> list[int | None]:
    """Each layer's window, in tokens: `layer_types` says which have one, else all from `max_window_layers` on.

    Raises:
        ModelFilesError: layer_types names a type that is not served.
    """
    num_layers, types = config.num_hidden_layers, config.layer_types
    if types is None:
        return [config.sliding_window if i >= config.max_window_layers else None for i in range(num_layers)]
    for layer_type in types:
        if layer_type not in _WINDOWED:
            raise ModelFilesError(
                f"layer type {layer_type!r} in config.json is not served; these are: {', '.join(_WINDOWED)}"
            )
    return [config.sliding_window if _WINDOWED[layer_type] else None for layer_type in types]
