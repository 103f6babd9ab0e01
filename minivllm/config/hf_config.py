"""What a checkpoint's config.json says, read once and checked, without torch or transformers.

Both spellings are read: the classic one (torch_dtype, rope_theta, rope_scaling) and that of
transformers 5 (dtype, rope_parameters).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minivllm.exceptions import ModelFilesError

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class HFConfig:
    """The sizes and switches of a decoder-only model."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool | None = None  # None: the config is silent and the architecture decides
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] = field(default_factory=dict)  # rope_type and its factors
    dtype: str | None = None
    eos_token_ids: list[int] = field(default_factory=list)
    bos_token_id: int | None = None
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, source: str = "config.json") -> HFConfig:
        """Read a parsed config.json.

        Raises:
            ModelFilesError: a size is missing or not a positive whole number; the message names the key.
        """
        architectures = raw.get("architectures") or []
        if not isinstance(architectures, list) or not architectures:
            raise ModelFilesError(f"{source} names no architecture; add one, e.g. \"architectures\": [\"LlamaForCausalLM\"]")
        for key in _REQUIRED:
            value = raw.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ModelFilesError(f"{source}: {key} is {value!r}; it must be a positive whole number")
        heads = raw["num_attention_heads"]
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        if "type" in rope and "rope_type" not in rope:
            rope["rope_type"] = rope.pop("type")
        eos = raw.get("eos_token_id")
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        if dtype is not None and dtype not in _DTYPES:
            raise ModelFilesError(f"{source}: dtype {dtype!r} is not one of {', '.join(_DTYPES)}; pass --dtype")
        use_window = raw.get("use_sliding_window", True)
        return cls(
            architecture=architectures[0],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            vocab_size=raw["vocab_size"],
            max_position_embeddings=raw.get("max_position_embeddings") or 2048,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            hidden_act=raw.get("hidden_act", "silu"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=raw.get("attention_bias"),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            sliding_window=raw.get("sliding_window") if use_window else None,
            layer_types=raw.get("layer_types"),
            rope_theta=float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0),
            rope_parameters=rope,
            dtype=dtype,
            eos_token_ids=[] if eos is None else list(eos) if isinstance(eos, list) else [eos],
            bos_token_id=raw.get("bos_token_id"),
            initializer_range=raw.get("initializer_range", 0.02),
        )
