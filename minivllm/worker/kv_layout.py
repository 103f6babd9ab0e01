"""Which layers share a block table, and where each layer's keys and values lie: before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

from minivllm.messages.kv_cache import KVCacheGroup, blocks_of_request

MAX_GROUPS = 8  # every group is one more block table for each request, on both sides


def group_layers(
    windows: Sequence[int | None], *, max_model_len: int, step_tokens: int, block_size: int
) -> tuple[KVCacheGroup, ...]:
    """Layers of one kind (full attention, or a window of one size), cut into groups of nearly equal size.

    windows: each layer's window in tokens, or None. All layers of one kind: one group, and nothing is lost.

    A block serves one group and has room for the largest: so blocks of all groups are of one size, and one pool serves
    them. Smaller groups leave that room unused, so the size is chosen: that with which one request of max_model_len
    takes the least memory, of those that make at most MAX_GROUPS groups; then the one that makes the fewest. (vLLM
    takes the number of layers of the rarest kind, or of the commonest if that is not much more: often the same.) What
    full attention pads is paid for every token, what a window pads only for a window's worth.
    """
    kinds: dict[int | None, list[int]] = {}
    for index, window in enumerate(windows):
        kinds.setdefault(window, []).append(index)

    def grouped(size: int) -> tuple[KVCacheGroup, ...]:
        groups = []
        for window, layers in kinds.items():
            num_groups = -(-len(layers) // size)
            groups += [KVCacheGroup(tuple(layers[i::num_groups]), window) for i in range(num_groups)]
        return tuple(groups)

    def cost(groups: tuple[KVCacheGroup, ...]) -> tuple[int, int]:
        num_blocks = blocks_of_request(groups, max_model_len, step_tokens, block_size)
        return num_blocks * layers_per_block(groups), len(groups)

    most = max(map(len, kinds.values()))
    choices = [grouped(size) for size in range(1, most + 1)]
    few = [groups for groups in choices if len(groups) <= max(MAX_GROUPS, len(kinds))]
    return min(few, key=cost)


def all_full(num_layers: int) -> tuple[KVCacheGroup, ...]:
    """One group that keeps every token: what windows would let go of is kept, and not read."""
    return (KVCacheGroup(tuple(range(num_layers))),)


def layers_per_block(groups: Sequence[KVCacheGroup]) -> int:
    """How many layers' keys and values a block has room for."""
    return max(len(group.layers) for group in groups)


def places(groups: Sequence[KVCacheGroup]) -> list[tuple[int, int]]:
    """For each layer of the model (group, place in a block): layers at one place share a tensor, never a block."""
    placed = {
        layer: (number, place) for number, group in enumerate(groups) for place, layer in enumerate(group.layers)
    }
    return [placed[layer] for layer in range(len(placed))]
