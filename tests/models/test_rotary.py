"""Rope scalings against transformers' own tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minivllm.config.hf_config import ROPE_TYPES, HFConfig
from minivllm.layers.rotary import _FREQUENCIES, RotaryEmbedding

POSITIONS = 700
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", **YARN, "attention_factor": 1.25},
    {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
]


def config(rope: dict[str, Any], max_positions: int = 1024) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1,
        "num_attention_heads": 4, "head_dim": 64, "vocab_size": 99, "max_position_embeddings": max_positions,
        "rope_parameters": {"rope_theta": 10000.0, **rope},
    }  # fmt: skip


@pytest.mark.parametrize("rope", SCALINGS, ids=lambda rope: "-".join(map(str, rope.values())))
def test_the_table_is_that_of_transformers_to_the_bit(rope: dict[str, Any]):
    raw = config(rope)
    hf = LlamaRotaryEmbedding(LlamaConfig(**{key: raw[key] for key in raw if key != "architectures"}))
    positions = torch.arange(POSITIONS)
    cos, sin = hf(torch.zeros(1), positions.unsqueeze(0))
    ours = RotaryEmbedding(HFConfig.from_dict(raw), POSITIONS, device="cpu").cos_sin
    expected = torch.cat([cos[0, :, :32], sin[0, :, :32]], dim=-1)
    assert torch.equal(ours, expected)


def test_every_type_that_a_config_may_name_has_frequencies():
    assert set(_FREQUENCIES) == set(ROPE_TYPES)
