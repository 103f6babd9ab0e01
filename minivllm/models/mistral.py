"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama without biases, with one window for all layers."""

from __future__ import annotations

from minivllm.config.hf_config import HFConfig
from minivllm.models.decoder import DecoderForCausalLM, Variant


class MistralForCausalLM(DecoderForCausalLM):
    @staticmethod
    def variant(config: HFConfig) -> Variant:
        return Variant(sliding_windows=[config.sliding_window] * config.num_hidden_layers)
