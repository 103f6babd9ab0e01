"""Which model is served, and how its outputs are defined."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    model: str = ""
    """A local directory or a hub id; not given: the model in the box."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer; the model's own when not given."""
    tokenizer_mode: Literal["auto", "hf"] = "auto"
    """auto: the fast tokenizer in tokenizer.json, else what transformers finds; hf: always transformers' choice."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of the tokenizer on the hub."""
    trust_remote_code: bool = False
    """Let transformers run the tokenizer code that a repository carries. Model code is never run."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "half", "float"] = "auto"
    """Type of weights and activations; auto: the checkpoint's own."""
    quantization: Literal["int8", "int4", "fp8"] | None = field(default=None, metadata={"short": "-q"})
    """int8: weights become 8-bit integers as they are loaded, one scale an output feature, and so do activations, one
    scale a token. Half the memory of bfloat16, and about twice as fast where reading weights is the limit. int4: the
    same with weights of 4 bits, in groups of 128 of an output feature's inputs, to the nearest, and the vocabulary
    matrix in int8; on CPUs. It costs quality, the more the smaller the model (see docs/operations.md). fp8: as int8
    in 8-bit floats (e4m3), on GPUs of compute capability 8.9 or above."""
    seed: int = 0
    """Seed of what is not seeded by a request."""
    max_model_len: int | Literal["auto"] | None = None
    """Longest prompt plus output, in tokens (1k and 1K are read as 1,000 and 1,024); auto (or -1): the longest
    that fits the KV cache; not given: the model's own limit."""
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    """JSON merged into config.json."""
    generation_config: str = "auto"
    """Where default sampling parameters come from: auto (the model's generation_config.json), vllm (none), or a
    directory."""
    override_generation_config: dict[str, Any] = field(default_factory=dict)
    """JSON merged into the generation config."""
    max_logprobs: int = 20
    """Most logprobs a request may ask for; -1: the vocabulary."""
    logprobs_mode: Literal["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"] = "raw_logprobs"
    """What logprobs mean: of the model's own distribution (raw) or after penalties, temperature and masks."""
    logits_processors: list[str] | None = None
    """Classes that change the logits of every batch, as module:Class (see docs/sampling.md)."""
    skip_tokenizer_init: bool = False
    """Token ids in, token ids out: no tokenizer is loaded and prompts must be token ids."""
    enable_prompt_embeds: bool = False
    """Take prompts as vectors in place of their tokens' embeddings: prompt_embeds of /v1/completions and of LLM
    (see docs/prompt_embeds.md)."""
    served_model_name: list[str] | None = None
    """Names under which the API serves the model; the first is reported. Default: the model argument."""
    enable_sleep_mode: bool = False
    """Let POST /sleep (or LLM.sleep) give memory back while the engine lives on."""
    enforce_eager: bool = False
    """Call every kernel of a step from Python, instead of replaying the calls of steps of a shape met before (decodes,
    and on a CPU short prompts). The answers are the same."""
