"""Gemma 3, text only (Gemma Team 2025, arXiv:2503.19786).

Gemma 2 with queries and keys normalised head by head in place of the cap on scores, five layers with a window to one
without, and a rotary base of its own for each kind.
"""

from __future__ import annotations

from dataclasses import replace

from minivllm.config.hf_config import HFConfig
from minivllm.layers.rotary import RotaryEmbedding
from minivllm.models.gemma2 import Gemma2ForCausalLM

DEFAULT_LOCAL_THETA = 10000.0


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    DEFAULT_PATTERN = 6
    QK_NORM = True

    @staticmethod
    def rotaries(config: HFConfig, max_positions: int, device: str) -> tuple[RotaryEmbedding, RotaryEmbedding]:
        theta = config.local_rope_theta or DEFAULT_LOCAL_THETA
        local = replace(config, rope_theta=theta, rope_parameters={})
        return tuple(RotaryEmbedding(each, max_positions, device=device) for each in (config, local))
