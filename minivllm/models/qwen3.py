"""Qwen3, dense (arXiv:2505.09388): queries and keys normalised head by head, in place of Qwen2's bias."""

from __future__ import annotations

from minivllm.config.hf_config import HFConfig
from minivllm.models.decoder import DecoderForCausalLM, Variant
from minivllm.models.qwen2 import sliding_windows


class Qwen3ForCausalLM(DecoderForCausalLM):
    @staticmethod
    def variant(config: HFConfig) -> Variant:
        bias = bool(config.attention_bias)
        return Variant(sliding_windows=sliding_windows(config), qkv_bias=bias, o_bias=bias, qk_norm=True)
