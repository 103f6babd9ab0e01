"""How much work one engine step may hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_batched_tokens: int | None = None
    """Tokens computed in one step, at most. Default on a CPU: 2048 serving, 4096 offline."""
    max_num_seqs: int | None = None
    """Requests in one step, at most. Default on a CPU: 128 serving, 256 offline."""
    enable_chunked_prefill: bool = True
    """Cut long prompts over several steps. Without it a prompt must fit into one step."""
    stream_interval: int = 1
    """Tokens between two chunks of a stream; the first and the last are sent at once."""
