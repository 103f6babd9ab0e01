"""The CPU backend: what a step's requests have in common, and what its cache takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minivllm.attention.backend import AttentionSpec, StepInputs
from minivllm.attention.backends.cpu_native import CpuNativeBackend, shared_prefixes


def a_step(tables, seq_lens, q_lens=None):
    width = max(map(len, tables))
    table = torch.tensor([row + [0] * (width - len(row)) for row in tables], dtype=torch.int32)
    starts = torch.tensor([0, *(q_lens or [1] * len(tables))]).cumsum(0, dtype=torch.int32)
    return StepInputs(
        starts, torch.tensor(seq_lens, dtype=torch.int32), table, torch.zeros(0, dtype=torch.int64)
    )


def groups(step, block_size=128):
    """[(members, shared tokens)]"""
    shared = shared_prefixes(step, block_size)
    if shared is None:
        return []
    starts, members = shared.group_starts.tolist(), shared.members.tolist()
    return [(members[a:b], n) for a, b, n in zip(starts, starts[1:], shared.lens.tolist())]


def test_requests_with_equal_leading_blocks_are_a_group():
    step = a_step([[5, 6, 7], [1, 2], [5, 6, 9], [5, 6, 8, 4]], [300, 200, 257, 500])
    assert groups(step) == [([0, 2, 3], 256)]


def test_only_blocks_full_in_every_member_are_shared():
    assert groups(a_step([[5, 6], [5, 6]], [256, 255])) == [([0, 1], 128)]
    assert groups(a_step([[5], [5]], [100, 128])) == []


def test_a_shared_part_ends_where_a_step_of_the_kernel_does():
    tables = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]]
    assert groups(a_step(tables, [190, 190]), block_size=32) == [([0, 1], 128)]
    assert groups(a_step([row[:4] for row in tables], [127, 127]), block_size=32) == []


def test_there_may_be_several_groups_and_prompts_are_in_none():
    step = a_step([[5, 6], [1, 2], [5, 7], [1, 3], [5, 6]], [200, 200, 140, 140, 200], [1, 1, 1, 1, 3])
    assert groups(step) == [([1, 3], 128), ([0, 2], 128)]


def test_nothing_in_common_is_no_group():
    assert groups(a_step([[1, 2], [3, 4]], [200, 200])) == []
    assert groups(a_step([[1, 2]], [200])) == []


def spec(**changes):
    sizes = dict(num_heads=4, num_kv_heads=2, head_dim=64, block_size=128, dtype=torch.bfloat16, device="cpu")
    return AttentionSpec(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("kv_cache_dtype", "name", "bytes_per_token"),
    [
        ("auto", "bfloat16", 512),
        ("float16", "float16", 512),
        ("fp8", "fp8_e4m3", 256),
        ("int8", "int8", 256 + 16),
    ],
)
def test_a_cache_takes_the_bytes_of_its_type(kv_cache_dtype, name, bytes_per_token):
    backend = CpuNativeBackend(spec(kv_cache_dtype=kv_cache_dtype))
    assert backend.layout_id == f"tile32-{name}-v1"
    assert backend.block_bytes == 128 * bytes_per_token
    cache = backend.new_kv_cache(3)
    assert cache.nbytes == 3 * backend.block_bytes and cache[0].is_contiguous()


def test_the_cache_follows_the_models_type_unless_told_otherwise():
    assert CpuNativeBackend(spec(dtype=torch.float32)).layout_id == "tile32-float32-v1"
    assert (
        CpuNativeBackend(spec(dtype=torch.float32, kv_cache_dtype="bfloat16")).layout_id
        == "tile32-bfloat16-v1"
    )


def test_a_type_it_does_not_know_is_named():
    assert "no KV cache in fp8_e5m2" in CpuNativeBackend.why_not(spec(kv_cache_dtype="fp8_e5m2"))


def test_what_is_shared_is_said_where_a_recorded_step_reads_it():
    backend = CpuNativeBackend(spec())
    room = backend.new_room(8)
    places = set()
    for tables in ([[5, 6, 7], [5, 6, 8]], [[5, 6], [9, 6], [5, 4], [9, 3], [9, 3]]):
        step = replace(a_step(tables, [300] * len(tables)), room=room)
        metadata, apart = backend.build_metadata(step), backend.build_metadata(replace(step, room=None))
        assert backend.sizes_of(metadata) == (len(apart.shared.lens), len(apart.shared.members))
        recorded = backend.metadata_of_sizes(step, backend.sizes_of(metadata))
        for name in ("members", "group_starts", "lens"):
            ours, its = getattr(metadata.shared, name), getattr(recorded.shared, name)
            assert ours.tolist() == getattr(apart.shared, name).tolist()
            assert ours.data_ptr() == its.data_ptr() and ours.shape == its.shape
        places.add(metadata.shared.lens.data_ptr())
    assert len(places) == 1
    nothing = backend.build_metadata(replace(a_step([[5], [6]], [100, 100]), room=room))
    assert backend.sizes_of(nothing) == (0, 0)
    assert backend.most_sizes(8) == (4, 8)
