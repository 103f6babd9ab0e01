"""config.json as it comes: both spellings are read, and what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest

from minivllm.config.hf_config import HFConfig
from minivllm.exceptions import ModelFilesError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def read(**changes: Any) -> HFConfig:
    return HFConfig.from_dict({**LLAMA, **changes}, source="some/config.json")


def test_sizes_that_are_left_out_follow_from_the_others():
    config = read()
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert config.rope_theta == 10000.0


def test_a_null_is_as_good_as_a_missing_key():
    assert read(num_key_value_heads=None, head_dim=None, rope_scaling=None, sliding_window=None) == read()


def test_both_spellings_of_rope_and_dtype_mean_the_same():
    classic = read(
        torch_dtype="bfloat16", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}
    )
    new = read(
        dtype="bfloat16", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    )
    assert classic == new
    assert new.rope_parameters == {"rope_type": "linear", "factor": 2.0}


def test_one_end_token_or_several_are_a_list():
    assert read(eos_token_id=2).eos_token_ids == [2]
    assert read(eos_token_id=[2, 4]).eos_token_ids == [2, 4]


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({}, 4096),
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        (LLAMA3, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 4.0}, 16384),
    ],
)
def test_the_context_is_what_the_rope_scaling_makes_of_it(rope: dict, limit: int):
    assert read(rope_parameters=rope).max_context == limit


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 0),
        ("vocab_size", "300"),
        ("num_hidden_layers", True),
        ("num_key_value_heads", 3),
        ("head_dim", -16),
        ("rms_norm_eps", "small"),
        ("rope_parameters", "linear"),
        ("rope_theta", "big"),
        ("dtype", "int8"),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, "2"]),
        ("hidden_act", 7),
        ("hidden_act", "gelu"),
        ("head_dim", 24),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["full_attention"]),
        ("sliding_window", "wide"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(key: str, value: Any):
    with pytest.raises(ModelFilesError, match=key) as error:
        read(**{key: value})
    assert "some/config.json" in str(error.value)


@pytest.mark.parametrize(
    ("rope", "name"),
    [
        ({"rope_type": "longrope"}, "longrope"),
        ({"rope_type": ["yarn"]}, "rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_type": "linear"}, "'factor'"),
        ({"rope_type": "linear", "factor": None}, "'factor'"),
        ({"rope_type": "yarn"}, "'factor'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "'high_freq_factor'"),
    ],
)
def test_a_rope_that_is_not_served_is_refused_by_name(rope: dict, name: str):
    with pytest.raises(ModelFilesError, match=name) as error:
        read(rope_parameters=rope)
    assert "some/config.json" in str(error.value)


def test_yarn_works_out_a_factor_of_null():
    assert read(rope_parameters={"rope_type": "yarn", "factor": None}).rope_parameters["factor"] is None


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [3]])
def test_without_an_architecture_the_remedy_is_shown(architectures: Any):
    with pytest.raises(ModelFilesError, match="names no architecture"):
        read(architectures=architectures)


@pytest.mark.parametrize(
    ("key", "value"),
    [("quantization_config", {"quant_method": "awq"}), ("partial_rotary_factor", 0.5), ("logit_scale", 0.1)],
)
def test_what_would_change_the_result_and_is_not_honoured_is_refused(key: str, value: Any):
    with pytest.raises(ModelFilesError, match=f"some/config.json: {key} is"):
        read(**{key: value})
    assert read(**{key: None}) == read()


GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}


def test_both_spellings_of_gemmas_two_rotary_bases_mean_the_same():
    linear = {"rope_type": "linear", "factor": 8}
    classic = read(**GEMMA3, rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=linear)
    full = {"rope_type": "linear", "factor": 8, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 1e4}
    assert read(**GEMMA3, rope_parameters={"full_attention": full, "sliding_attention": local}) == classic
    assert (classic.rope_theta, classic.local_rope_theta, classic.hidden_act) == (1e6, 1e4, "gelu_pytorch_tanh")
    assert classic.tie_word_embeddings  # where the config is silent
    assert classic.max_context == 4096  # max_position_embeddings counts the stretching already


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"query_pre_attn_scalar": "wide"}, "query_pre_attn_scalar"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}}, "yarn"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": -1}}}, "rope_theta"),
    ],
)
def test_what_is_wrong_in_a_gemma_config_is_named(changes: dict[str, Any], name: str):
    with pytest.raises(ModelFilesError, match=name) as error:
        read(**GEMMA3, **changes)
    assert "some/config.json" in str(error.value)


def test_soft_caps_are_read_for_the_architectures_that_have_them_and_refused_for_others():
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    config = read(architectures=["Gemma2ForCausalLM"], **caps)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    with pytest.raises(ModelFilesError, match="softcapping"):
        read(**caps)
