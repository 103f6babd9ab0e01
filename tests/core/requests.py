"""Short ways to say a request and a scheduler."""

from __future__ import annotations

import random
from typing import Any

from minivllm.core.sched.scheduler import Scheduler
from minivllm.messages.engine import EngineCoreRequest, LoRAIdentity, PromptEmbeds
from minivllm.sampling_params import SamplingParams

EOS = 2


def make_request(
    request_id: str = "a",
    prompt: int | list[int] = 4,
    *,
    max_tokens: int | None = 8,
    seed: int = 0,
    eos: tuple[int, ...] = (),
    prior: tuple[int, ...] = (),
    client_index: int = 0,
    cache_salt: str | None = None,
    priority: int = 0,
    arrival_time: float = 0.0,
    vectors: list[int] | None = None,
    lora: LoRAIdentity | None = None,
    **params: Any,
) -> EngineCoreRequest:
    """A request; `prompt` is its tokens or their number (then 10, 11, …, the same for every request). vectors: in its
    place a prompt of embeddings, each made of one number below 256."""
    embeds = None
    if vectors is not None:
        prompt, embeds = [0] * len(vectors), PromptEmbeds("float16", 2, b"".join(bytes(4 * [v]) for v in vectors))
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(range(10, 10 + prompt)) if isinstance(prompt, int) else prompt,
        sampling_params=SamplingParams(max_tokens=max_tokens, **params),
        seed=seed,
        eos_token_ids=list(eos),
        prior_output_token_ids=list(prior),
        client_index=client_index,
        cache_salt=cache_salt,
        priority=priority,
        arrival_time=arrival_time,
        prompt_embeds=embeds,
        lora=lora,
    )


def make_scheduler(**changes: Any) -> Scheduler:
    """Room for everything, unless changed."""
    sizes: dict[str, Any] = {
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "max_model_len": 64,
        "num_blocks": 256,
        "block_size": 4,
    }
    return Scheduler(**{**sizes, **changes})


def drawn_rules(pick: random.Random, max_num_seqs: int) -> dict[str, Any]:
    """A policy and flags; none of them may change an answer."""
    return {
        "policy": pick.choice(["fcfs", "priority"]),
        "max_num_active_seqs": pick.choice([None, pick.randint(1, max_num_seqs)]),
        "long_prefill_token_threshold": pick.choice([0, 0, 1, 5, 11]),
        "max_num_mixed_prefill_tokens": pick.choice([0, 0, 1, 3, 10]),
        "watermark": pick.choice([0.0, 0.1, 0.4]),
        "reserve_full_isl": pick.random() < 0.5,
        "prefix_caching_hash_algo": pick.choice(["sha256", "xxhash"]),
        "prompt_share": pick.choice([0.5, 0.5, 0.2, 1.0]),
    }
