"""Which tokens end an answer: the same for whoever checks a request and whoever follows its grammar."""

from __future__ import annotations

from minivllm.config.engine import EngineConfig
from minivllm.tokenizer.tokenizer import Tokenizer


def end_tokens(config: EngineConfig, tokenizer: Tokenizer | None) -> tuple[list[int], list[int]]:
    """The end-of-sequence token, and further ones that act as stop_token_ids (vLLM's division)."""
    declared = config.generation_config.get("eos_token_id", config.hf_config.eos_token_ids)
    declared = [declared] if isinstance(declared, int) else list(declared or [])
    primary = tokenizer.eos_token_id if tokenizer is not None else None
    if primary is None and declared:
        primary = declared[0]
    eos = [] if primary is None else [primary]
    others = (token for token in dict.fromkeys(declared) if token not in eos)
    return eos, [token for token in others if 0 <= token < config.hf_config.vocab_size]
