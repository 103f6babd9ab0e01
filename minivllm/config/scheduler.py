"""How much work one engine step may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minivllm.exceptions import ConfigError

Usage = Literal["serve", "offline"]
# max_num_batched_tokens, max_num_seqs on a CPU; vLLM's.
_STEP_DEFAULTS: dict[Usage, tuple[int, int]] = {"serve": (2048, 128), "offline": (4096, 256)}


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_batched_tokens: int | None = None
    """Tokens computed in one step, at most. Default on a CPU: 2048 serving, 4096 offline."""
    max_num_seqs: int | None = None
    """Requests in one step, at most. Default on a CPU: 128 serving, 256 offline."""
    enable_chunked_prefill: bool = True
    """Cut long prompts over several steps. Without it a prompt must fit into one step."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """Who comes first: fcfs, by arrival; priority, by each request's priority (lower first), then by arrival. The last
    in that order is preempted first."""
    max_num_active_seqs: int | None = None
    """Requests that run at once, at most, when that is to be less than max_num_seqs."""
    long_prefill_token_threshold: int = 0
    """Tokens of one prompt in one step, at most, unless its request is alone; 0 sets no such limit. (While others
    wait, long prompts take at most half of a step anyway.)"""
    max_num_mixed_prefill_tokens: int = 0
    """Prompt tokens computed in one step, at most, while others decode; a sixteenth of all that wait, if that is more;
    0 sets no such limit. With one, no long prompt holds up streams for a whole step, and it waits longer itself."""
    watermark: float = 0.0
    """Share of the KV blocks that admitting a request must leave free for those that run."""
    scheduler_reserve_full_isl: bool = True
    """Admit a request only when the KV cache has room for all of its prompt, not just for its first chunk."""
    max_num_queued_reqs: int | None = None
    """Requests open in the server, at most; one more is answered with 503. An answer of n counts n times."""
    max_num_queued_tokens: int | None = None
    """Prompt tokens of requests still without a first token; once so many wait, a further request is answered with
    503."""
    async_scheduling: bool | None = None
    """Plan the next step while this one runs. Default: where steps run on a GPU. Changes no answer; see
    docs/operations.md for when it pays."""
    stream_interval: int = 1
    """Tokens between two chunks of a stream; the first and the last are sent at once."""

    def max_plans_in_flight(self, *, leaves_host_free: bool) -> int:
        """Steps planned before the first one's result is in, at most.

        leaves_host_free: whether a step runs on a device of its own, where planning meanwhile costs it nothing.
        """
        return 2 if (leaves_host_free if self.async_scheduling is None else self.async_scheduling) else 1


def step_limits(scheduler: SchedulerConfig, usage: Usage, max_model_len: int) -> tuple[int, int]:
    """max_num_batched_tokens and max_num_seqs.

    A default gives way to a limit that was given; two given ones must agree.
    max_model_len: what a step must hold without chunked prefill; 0 while it is not known yet.

    Raises:
        ConfigError: they contradict each other; the message names both.
    """
    tokens, seqs = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    default_tokens, default_seqs = _STEP_DEFAULTS[usage]
    longest = 0 if scheduler.enable_chunked_prefill else max_model_len
    if seqs is None:
        seqs = min(default_seqs, tokens or default_seqs)
    if tokens is None:
        tokens = max(default_tokens, seqs, longest)
    if tokens < seqs:
        raise ConfigError(
            f"max_num_batched_tokens={tokens} is less than max_num_seqs={seqs}: a step holds at least a token of "
            "each request; raise the first or lower the second"
        )
    if tokens < longest:
        raise ConfigError(
            f"max_num_batched_tokens={tokens} is less than max_model_len={longest}, and without chunked prefill a "
            "prompt must fit into one step; raise the first, lower the second, or leave chunked prefill on"
        )
    return tokens, seqs
