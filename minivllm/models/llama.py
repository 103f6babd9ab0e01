"""Llama 1 to 3.x (Touvron et al. 2023, arXiv:2302.13971; Dubey et al. 2024, arXiv:2407.21783)."""

from __future__ import annotations

from minivllm.config.hf_config import HFConfig
from minivllm.models.decoder import DecoderForCausalLM, Variant


class LlamaForCausalLM(DecoderForCausalLM):
    @staticmethod
    def variant(config: HFConfig) -> Variant:
        bias = bool(config.attention_bias)
        return Variant(
            sliding_windows=[None] * config.num_hidden_layers,
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=config.mlp_bias,
        )
