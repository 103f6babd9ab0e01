"""How much KV cache there will be, decided before any weight is read. Arithmetic only: allocates nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.config.cache import CacheConfig
from minivllm.config.hf_config import HFConfig
from minivllm.exceptions import ConfigError
from minivllm.messages.kv_cache import KVCacheGroup, KVCacheSpec, has_null_block, num_tokens_held

GIB = 1 << 30
DEFAULT_MOST_BYTES = 4 * GIB
DEFAULT_SHARE = 0.4  # of what is left after the weights


@dataclass(frozen=True)
class Budget:
    """The machine and the model, in bytes."""

    limit_bytes: int  # what this process may ever use
    available_bytes: int  # what could be allocated now
    weight_bytes: int
    step_bytes: int  # activations and logits of the largest step
    process_bytes: int = 0  # what this process already holds: the interpreter, torch
    graph_bytes: int = 0  # what captured decode steps keep, beside the largest step
    num_graphs: int = 0  # at most

    @property
    def left_bytes(self) -> int:
        """What is left for the cache once the weights are there and a step has room."""
        return self.available_bytes - self.weight_bytes - self.step_bytes - self.graph_bytes


@dataclass(frozen=True)
class Measured:
    """What steps were found to take on a device of its own, in bytes."""

    step_bytes: int  # the largest step, and the buffers of its inputs
    graph_bytes: int = 0  # captured decode steps, all that there may be
    num_graphs: int = 0


@dataclass(frozen=True)
class KVCacheSize:
    """What was decided."""

    num_blocks: int
    spec: KVCacheSpec
    max_model_len: int

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.spec.bytes_per_block

    @property
    def num_tokens(self) -> int:
        """In requests of max_model_len; without windows, in any."""
        spec = self.spec
        return num_tokens_held(spec.groups, self.num_blocks, self.max_model_len, spec.step_tokens, spec.block_size)

    @property
    def max_concurrency(self) -> float:
        """Requests of max_model_len that fit at once."""
        usable = self.num_blocks - has_null_block(self.spec.groups)
        return usable / self.spec.blocks_of_request(self.max_model_len)


def step_bytes(hf: HFConfig, num_tokens: int, num_seqs: int, dtype_bytes: int) -> int:
    """About what the largest step needs: a layer's activations, which a recording keeps apart, and its logits four
    times over: as two kinds of decodes leave them, as a prompt's step does, and a copy."""
    attention = 2 * (hf.num_attention_heads + hf.num_key_value_heads) * hf.head_dim
    width = 4 * hf.hidden_size + attention + 3 * hf.intermediate_size
    return num_tokens * width * dtype_bytes + 4 * num_seqs * hf.vocab_size * 4


def size_kv_cache(
    cache: CacheConfig, spec: KVCacheSpec, budget: Budget, max_model_len: int, *, is_auto: bool
) -> KVCacheSize:
    """Choose the number of blocks, and with `is_auto` shorten max_model_len to what fits.

    Raises:
        ConfigError: the weights do not fit, the cache asked for does not, or no request of max_model_len would.
    """
    check_weights_fit(budget)
    num_blocks = _num_blocks(cache, spec, budget)
    fitting_len = spec.longest_request(num_blocks, max_model_len)
    if is_auto and fitting_len:
        max_model_len = fitting_len
    size = KVCacheSize(num_blocks, spec, max_model_len)
    if fitting_len < max_model_len:
        num_blocks_needed = spec.blocks_of_request(max_model_len) + has_null_block(spec.groups)
        needed = num_blocks_needed * spec.bytes_per_block
        more = "--kv-cache-memory-bytes" if cache.num_gpu_blocks_override is None else "--num-gpu-blocks-override"
        remedy = f"pass --max-model-len {fitting_len} or auto, or" if fitting_len else "pass"
        raise ConfigError(
            f"one request of max_model_len {max_model_len} needs {gib(needed)} of KV cache and there are "
            f"{gib(size.num_bytes)}, which hold {fitting_len} tokens; {remedy} a larger {more}"
        )
    return size


def check_weights_fit(budget: Budget) -> None:
    """Raise ConfigError when not even the weights and one step fit into what is available."""
    if budget.left_bytes <= 0:
        raise ConfigError(
            f"the model needs {gib(budget.weight_bytes)} for weights{_graphs(budget)} and {gib(budget.step_bytes)} for "
            f"a step, {gib(budget.available_bytes)} of {gib(budget.limit_bytes)} are available; serve a smaller model, "
            "lower --max-num-batched-tokens, or give the process more memory"
        )


def _num_blocks(cache: CacheConfig, spec: KVCacheSpec, budget: Budget) -> int:
    if cache.num_gpu_blocks_override is not None:
        num_blocks = cache.num_gpu_blocks_override
        _check_room(f"--num-gpu-blocks-override {num_blocks}", num_blocks * spec.bytes_per_block, budget)
        return num_blocks
    if cache.kv_cache_memory_bytes is not None:
        asked = cache.kv_cache_memory_bytes
        _check_room(f"--kv-cache-memory-bytes {asked}", asked, budget)
        return asked // spec.bytes_per_block
    if cache.gpu_memory_utilization is not None:
        share = cache.gpu_memory_utilization
        needed = budget.process_bytes + budget.weight_bytes + budget.step_bytes + budget.graph_bytes
        room = int(share * budget.limit_bytes) - needed
        if room < spec.bytes_per_block:
            raise ConfigError(
                f"--gpu-memory-utilization {share:g} of {gib(budget.limit_bytes)} leaves no KV cache beside "
                f"{gib(budget.weight_bytes)} of weights{_graphs(budget)}, {gib(budget.step_bytes)} for a step and "
                f"{gib(budget.process_bytes)} in use; raise it"
            )
        _check_room(f"--gpu-memory-utilization {share:g}", room, budget)
        return room // spec.bytes_per_block
    return min(DEFAULT_MOST_BYTES, int(DEFAULT_SHARE * budget.left_bytes)) // spec.bytes_per_block


def _check_room(asked_by: str, num_bytes: int, budget: Budget) -> None:
    """A cache is touched page by page: one that is too large would be found out only under load."""
    if num_bytes > budget.left_bytes:
        raise ConfigError(
            f"{asked_by} is a KV cache of {gib(num_bytes)}; {gib(max(0, budget.left_bytes))} of "
            f"{gib(budget.limit_bytes)} are left beside the weights and what others use; lower it"
        )


def describe(size: KVCacheSize, budget: Budget) -> str:
    """The line the log shows."""
    used = budget.weight_bytes + budget.step_bytes + budget.graph_bytes + size.num_bytes
    return (
        f"memory: weights {gib(budget.weight_bytes)} + KV cache {gib(size.num_bytes)} + a step "
        f"{gib(budget.step_bytes)}{_graphs(budget, ' + ')} = {gib(used)} of {gib(budget.available_bytes)} available "
        f"(limit {gib(budget.limit_bytes)}); KV cache: {size.num_tokens:,} tokens in {size.num_blocks:,} blocks of "
        f"{size.block_size}, {size.max_concurrency:.2f} requests of {size.max_model_len:,} tokens at once"
        f"{_describe_groups(size.spec.groups)}"
    )


def _graphs(budget: Budget, before: str = ", ") -> str:
    """Empty where nothing is captured."""
    if not budget.num_graphs:
        return ""
    return f"{before}up to {budget.num_graphs} captured decode steps {gib(budget.graph_bytes)}"


def _describe_groups(groups: Sequence[KVCacheGroup]) -> str:
    """Empty for one group of full attention."""
    if not has_null_block(groups):
        return ""
    counts = Counter(map(_describe_group, groups))
    return "; block tables: " + ", ".join(f"{count} × {kind}" for kind, count in counts.items())


def _describe_group(group: KVCacheGroup) -> str:
    kind = "full attention" if group.sliding_window is None else f"window {group.sliding_window:,}"
    return f"{len(group.layers)} layers of {kind}"


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / (1 << 20):.1f} MiB"
