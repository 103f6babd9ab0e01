"""What a checkpoint's config.json says, read once and checked, without torch or transformers.

Both spellings are read: the classic one (torch_dtype, rope_theta, rope_scaling) and that of
transformers 5 (dtype, rope_parameters).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec

from minivllm.exceptions import ModelFilesError

# What the layers serve; they read it here, so that a config can be refused before torch is imported.
HIDDEN_ACTS = ("silu", "swish", "gelu_pytorch_tanh")
HEAD_DIM_STEP = 16  # attention's: one AVX-512 vector of float32
# Rope types and the parameters they cannot do without. yarn takes a factor of null, and works it out.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
# Keys that change what the model computes and that no layer honours, with the values that ask for nothing.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
    "partial_rotary_factor": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "use_bidirectional_attention": (None, False),
}
# But for these keys in these architectures.
_HONOURED_BY: dict[str, tuple[str, ...]] = {
    "attn_logit_softcapping": ("Gemma2ForCausalLM",),
    "final_logit_softcapping": ("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
}
_ROPE_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rope_theta",
)  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32")
_STRETCHING = ("linear", "yarn")  # rope types whose factor lengthens the context


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
    max_window_layers: int = 28  # without layer_types: the first layer that has the window
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] = field(default_factory=dict)  # rope_type and its factors
    dtype: str | None = None
    eos_token_ids: list[int] = field(default_factory=list)
    bos_token_id: int | None = None
    initializer_range: float = 0.02
    sliding_window_pattern: int | None = None  # without layer_types: of so many layers, the last has no window
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: by head_dim's
    attn_logit_softcapping: float | None = None  # scores and logits become cap * tanh(x / cap); None: they stay
    final_logit_softcapping: float | None = None
    local_rope_theta: float | None = None  # of layers with a window, where they turn otherwise than the rest

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, source: str = "config.json") -> HFConfig:
        """Read a parsed config.json.

        Raises:
            ModelFilesError: a value is missing, of the wrong kind or not served; the message names the key.
        """
        read = _Reader(raw, source)
        architecture = read_architecture(raw, source)
        read.refuse_what_is_not_honoured(architecture)
        hidden_size = read.size("hidden_size")
        heads = read.size("num_attention_heads")
        rope, local_rope_theta = read.rope(), read.local_rope_theta()
        # Silence means yes for Mistral, no for Qwen; Llama has no window and does not ask.
        use_window = raw.get("use_sliding_window", not str(raw.get("model_type")).startswith("qwen"))
        config = cls(
            architecture=architecture,
            hidden_size=hidden_size,
            intermediate_size=read.size("intermediate_size"),
            num_hidden_layers=read.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=read.size("num_key_value_heads", heads),
            head_dim=read.size("head_dim", hidden_size // heads or None),
            vocab_size=read.size("vocab_size"),
            max_position_embeddings=read.size("max_position_embeddings", 2048),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            hidden_act=raw.get("hidden_activation") or raw.get("hidden_act", "silu"),
            # Silence means yes for Gemma.
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", str(raw.get("model_type")).startswith("gemma"))),
            attention_bias=raw.get("attention_bias"),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            sliding_window=read.optional_size("sliding_window") if use_window else None,
            layer_types=raw.get("layer_types"),
            max_window_layers=raw.get("max_window_layers", 28),
            rope_theta=read.rope_theta(rope),
            rope_parameters=rope,
            dtype=read.dtype(),
            eos_token_ids=read_token_ids(raw, "eos_token_id", source),
            bos_token_id=raw.get("bos_token_id"),
            initializer_range=read.number("initializer_range", 0.02),
            sliding_window_pattern=read.optional_size("sliding_window_pattern"),
            query_pre_attn_scalar=read.optional_number("query_pre_attn_scalar"),
            attn_logit_softcapping=read.optional_number("attn_logit_softcapping"),
            final_logit_softcapping=read.optional_number("final_logit_softcapping"),
            local_rope_theta=local_rope_theta,
        )
        config._check_together(source)
        return config

    def _check_together(self, source: str) -> None:
        try:
            msgspec.convert(msgspec.to_builtins(self), HFConfig)  # what `from_dict` took over as it stood
        except msgspec.ValidationError as error:
            raise ModelFilesError(f"{source}: {str(error).replace('`', '')}") from None
        if self.hidden_act not in HIDDEN_ACTS:
            raise ModelFilesError(
                f"{source}: hidden_act {self.hidden_act!r} is not served; these are: {', '.join(HIDDEN_ACTS)}"
            )
        if self.head_dim % HEAD_DIM_STEP:
            raise ModelFilesError(
                f"{source}: head_dim {self.head_dim} is not served; a multiple of {HEAD_DIM_STEP} is"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelFilesError(
                f"{source}: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ModelFilesError(
                f"{source}: layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers"
            )

    @property
    def max_context(self) -> int:
        """Positions the model can tell apart: vLLM's derivation, where yarn stretches the original limit.

        Gemma 3's max_position_embeddings is the stretched one.
        """
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type not in _STRETCHING or self.architecture.startswith("Gemma3"):
            return self.max_position_embeddings
        limit = self.max_position_embeddings
        if rope_type == "yarn":
            limit = self.rope_parameters.get("original_max_position_embeddings") or limit
        return int(limit * (self.rope_parameters.get("factor") or 1))


def read_architecture(raw: dict[str, Any], source: str = "config.json") -> str:
    """The class a checkpoint was trained as: the first of `architectures`."""
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ModelFilesError(
            f'{source} names no architecture; add one, e.g. "architectures": ["LlamaForCausalLM"]'
        )
    return architectures[0]


def read_token_ids(raw: dict[str, Any], key: str, source: str) -> list[int]:
    """One token id or a list of them, as a list; [] where the key is missing or null."""
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise ModelFilesError(f"{source}: {key} is {value!r}; it must be a token id or a list of them")
    return ids


class _Reader:
    """Reads keys of a raw config, each as one kind of value; None counts as missing."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def _fail(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise ModelFilesError(f"{self.source}: {key} is {value!r}; it must be {wanted}")

    def refuse_what_is_not_honoured(self, architecture: str) -> None:
        for key, harmless in _NOT_HONOURED.items():
            if architecture in _HONOURED_BY.get(key, ()):
                continue
            if (value := self.raw.get(key)) not in harmless:
                raise ModelFilesError(
                    f"{self.source}: {key} is {value!r}, which is not supported yet; serve a checkpoint without it"
                )

    def optional_size(self, key: str) -> int | None:
        return None if self.raw.get(key) is None else self.size(key)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self._fail(key, value, "a positive whole number")
        return value

    def optional_number(self, key: str) -> float | None:
        return None if self.raw.get(key) is None else self.number(key, 1.0)

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            self._fail(key, value, "a positive number")
        return float(value)

    def rope(self) -> dict[str, Any]:
        """rope_parameters, or the classic rope_scaling with its `type` renamed."""
        rope = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            self._fail("rope_parameters", rope, "an object")
        if "full_attention" in rope:  # one for each type of layer
            rope = rope["full_attention"]
            if not isinstance(rope, dict):
                self._fail("rope_parameters.full_attention", rope, "an object")
        rope = dict(rope)
        if "type" in rope:
            rope.setdefault("rope_type", rope.pop("type"))
        for key in _ROPE_NUMBERS:
            value = rope.get(key)
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0):
                self._fail(f"rope_parameters.{key}", value, "a positive number")
        self._check_rope_is_served(rope)
        return rope

    def local_rope_theta(self) -> float | None:
        """Gemma 3's second base, in either spelling."""
        rope = self.raw.get("rope_parameters")
        local = rope.get("sliding_attention") if isinstance(rope, dict) else None
        if local is None:
            return self.optional_number("rope_local_base_freq")
        if not isinstance(local, dict):
            self._fail("rope_parameters.sliding_attention", local, "an object")
        if local.get("rope_type", "default") != "default":
            raise ModelFilesError(
                f"{self.source}: rope_type {local['rope_type']!r} is not served in layers with a window; default is"
            )
        return _Reader(local, f"{self.source}: rope_parameters.sliding_attention").number("rope_theta", 10000.0)

    def _check_rope_is_served(self, rope: dict[str, Any]) -> None:
        rope_type = rope.get("rope_type", "default")
        if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
            raise ModelFilesError(
                f"{self.source}: rope_type {rope_type!r} is not served; these are: {', '.join(ROPE_TYPES)}"
            )
        for key in ROPE_TYPES[rope_type]:
            if key not in rope or (rope[key] is None and rope_type != "yarn"):
                raise ModelFilesError(f"{self.source}: rope_type {rope_type!r} needs {key!r}; add it")
        part = rope.get("partial_rotary_factor", self.raw.get("partial_rotary_factor"))
        if part not in (None, 1):
            raise ModelFilesError(f"{self.source}: partial_rotary_factor {part!r} is not served; 1.0 is")

    def rope_theta(self, rope: dict[str, Any]) -> float:
        """Taken out of `rope` where transformers 5 keeps it."""
        inside = rope.pop("rope_theta", None)
        return float(inside) if inside is not None else self.number("rope_theta", 10000.0)

    def dtype(self) -> str | None:
        value = self.raw.get("dtype") or self.raw.get("torch_dtype")
        if value is not None and value not in _DTYPES:
            self._fail("dtype", value, f"one of {', '.join(_DTYPES)} (--hf-overrides can replace it)")
        return value
