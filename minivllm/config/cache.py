"""How much KV cache there is and how it is cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KV_TILE = 32  # absolute positions a tile of attention; a block is a multiple, so that a tile lies in one block


@dataclass(frozen=True)
class CacheConfig:
    block_size: int | None = None
    """Tokens in a KV block; default 128 on a CPU, where it must be a multiple of 32, and 64 on a GPU (of 16)."""
    gpu_memory_utilization: float | None = None
    """Share of the device's memory for weights and KV cache together (on a CPU: of the cgroup's limit; on a GPU: of
    what was free at the start, default 0.92). Default on a CPU: a KV cache of min(4 GiB, 40 % of what is left after the
    weights)."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache in bytes (4GiB and 4G are 4 * 2**30, 4GB is 4 * 10**9); wins over the share."""
    num_gpu_blocks_override: int | None = None
    """Number of KV blocks; wins over both sizes."""
    touch_kv_cache: bool = False
    """Take the memory of the whole KV cache behind the start, by a thread of the lowest priority, in the order in which
    blocks are handed out. Without it, it is taken as blocks are first written, in the middle of answers: cheap, but on
    a virtual machine that gets its memory only when it touches it."""
    enable_prefix_caching: bool = True
    """Keep the KV blocks of past prompts and reuse them for equal prefixes."""
    disable_hybrid_kv_cache_manager: bool = False
    """Keep the KV of every token in every layer. Without it, layers with a sliding window let go of what the window has
    passed. Answers are the same."""
    prefix_caching_hash_algo: Literal["sha256", "xxhash"] = "sha256"
    """How blocks are named: sha256, which nobody can make collide, or xxhash (XXH3 of 128 bits, with a secret drawn at
    the start), which is faster and needs the package xxhash."""
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "int8"] = "auto"
    """What keys and values are stored as, whatever the model computes in; auto: the same. fp8 is fp8_e4m3, with the
    checkpoint's k_scale and v_scale, or 1; int8 has a scale for each token and KV head, made from its own key or value
    alone. Either halves what bfloat16 takes."""
