"""A trained model as a Hugging Face directory, and back.

Owns config.json, generation_config.json and model.safetensors (bf16); the tokenizer's files are `tokenizer.py`'s.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from examples.box_model.chat import END_OF_TEXT, PAD, TURN_END
from examples.box_model.model import Qwen3, Sizes
from examples.box_model.tokenizer import save_tokenizer

# What a request gets that does not say: a small model's tail is noise.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}


def export(model: Qwen3, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the model at `directory`, which need not exist."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = {name: tokenizer.token_to_id(name) for name in (PAD, END_OF_TEXT, TURN_END)}
    _write(directory / "config.json", model_config(model.sizes, ids))
    ends = [ids[TURN_END], ids[END_OF_TEXT]]
    _write(directory / "generation_config.json", SAMPLING | {"eos_token_id": ends, "pad_token_id": ids[PAD]})
    save_tokenizer(tokenizer, directory, model.sizes.max_position_embeddings)
    tensors = {
        name: tensor.to(torch.bfloat16).cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})


def read(directory: Path) -> Qwen3:
    """The float32 network of a directory that `export` wrote."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model = Qwen3(Sizes(**{field.name: config[field.name] for field in fields(Sizes)}))
    model.load_state_dict(load_file(str(directory / "model.safetensors")))
    return model


def model_config(sizes: Sizes, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": sizes.max_position_embeddings,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": ids[TURN_END],
        "pad_token_id": ids[PAD],
        "torch_dtype": "bfloat16",
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
