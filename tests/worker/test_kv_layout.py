"""Which layers share a block table: what is grouped, what is padded, and where a layer's bytes lie."""

from __future__ import annotations

import pytest

from minivllm.messages.kv_cache import KVCacheGroup, blocks_of_request
from minivllm.worker.kv_layout import MAX_GROUPS, all_full, group_layers, layers_per_block, places


def grouped(windows: list[int | None], max_model_len: int = 32768) -> tuple[KVCacheGroup, ...]:
    return group_layers(windows, max_model_len=max_model_len, step_tokens=2048, block_size=128)


def kinds(groups: tuple[KVCacheGroup, ...]) -> list[tuple[int | None, int]]:
    return [(group.sliding_window, len(group.layers)) for group in groups]


@pytest.mark.parametrize("window", [None, 4096])
def test_layers_of_one_kind_are_one_group(window: int | None):
    assert grouped([window] * 5) == (KVCacheGroup((0, 1, 2, 3, 4), window),)


def test_kinds_with_equally_many_layers_are_a_group_each():
    assert grouped([512, None] * 3) == (KVCacheGroup((0, 2, 4), 512), KVCacheGroup((1, 3, 5), None))


def test_gemma_3_1b_has_a_full_group_of_4_and_windows_in_groups_of_at_most_4():
    groups = grouped([None if (i + 1) % 6 == 0 else 512 for i in range(26)])
    assert kinds(groups) == [(512, 4)] * 4 + [(512, 3)] * 2 + [(None, 4)]
    assert next(each for each in groups if each.sliding_window is None).layers == (5, 11, 17, 23)


def test_full_layers_are_not_padded_for_a_few_windows_and_groups_stay_few():
    groups = grouped([None] * 27 + [512])
    assert len(groups) <= MAX_GROUPS
    assert sum(len(each.layers) for each in groups if each.sliding_window is None) == 27
    bytes_with = blocks_of_request(groups, 32768, 2048, 128) * layers_per_block(groups)
    assert bytes_with <= 28 * 256  # no more than with full attention everywhere


@pytest.mark.parametrize("seed", range(20))
def test_every_layer_is_in_one_group_and_has_a_place_of_its_own_there(seed: int):
    windows = [[None, 512, 4096][(seed * 7 + i * i) % 3] for i in range(1 + seed * 2)]
    groups = grouped(windows)
    found = places(groups)
    assert len(found) == len(set(found)) == len(windows)
    assert all(groups[group].sliding_window == window for (group, _), window in zip(found, windows))
    assert max(place for _, place in found) + 1 == layers_per_block(groups)


def test_all_full_keeps_every_layer_in_one_group():
    assert all_full(3) == (KVCacheGroup((0, 1, 2), None),)
