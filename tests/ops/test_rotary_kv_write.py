"""Rotation and cache write in one pass: the bits of the two ops one after the other, whatever tokens go together."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import kv_write, rotary, rotary_kv_write
from minivllm.ops.kv_layout import KV_TYPES, KvLayout
from minivllm.ops.op import OpSpec

NUM_BLOCKS, BLOCK_SIZE, MAX_POSITION = 5, 64, 512
pytestmark = pytest.mark.usefixtures("isa")


def table(rot_dim):
    angles = torch.arange(MAX_POSITION)[:, None] * 10000.0 ** -(torch.arange(rot_dim // 2) / (rot_dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def new_step(dtype, num_tokens, head_dim, kind="bfloat16", kv_heads=3):
    """A layout, a cache, and q, k and v as views of one projection."""
    layout = KvLayout(kind, kv_heads, head_dim, BLOCK_SIZE)
    cache = torch.randint(0, 256, layout.shape(NUM_BLOCKS), dtype=torch.uint8)
    qkv = torch.randn(num_tokens, 4 * kv_heads, head_dim).to(dtype)
    return layout, cache, qkv.split([2 * kv_heads, kv_heads, kv_heads], dim=1)


def one_after_the_other(positions, q, k, v, cos_sin, norms, cache, slots, *, layout, **scales):
    rotary.cpu(positions, q, k, cos_sin, norms)
    kv_write.cpu(k, v, cache, slots, layout=layout, **scales)


def turned_and_written(implementation, positions, heads, cos_sin, norms, cache, slots, layout, **scales):
    """What becomes of q and of the cache."""
    (q, k, v), cache = (x.clone() for x in heads), cache.clone()
    implementation(positions, q, k, v, cos_sin, norms, cache, slots, layout=layout, **scales)
    return q, cache


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 150])
@pytest.mark.parametrize("kind", KV_TYPES)
@pytest.mark.parametrize("head_dim, rot_dim", [(128, 128), (64, 64), (48, 48), (48, 16)])
def test_it_is_the_rotation_and_then_the_write(dtype, kind, head_dim, rot_dim, num_tokens, assert_same_bits):
    layout, cache, heads = new_step(dtype, num_tokens, head_dim, kind)
    norms = rotary.HeadNorms(torch.rand(head_dim).to(dtype), torch.rand(head_dim).to(dtype), 1e-6)
    positions, slots = torch.randint(0, MAX_POSITION, (num_tokens,)), torch.arange(3, 3 + num_tokens)
    slots[70:] += 32
    slots[40:41], slots[100:101] = -1, 300
    for given in (norms, None):
        rest = (positions, heads, table(rot_dim), given, cache, slots, layout)
        expected = turned_and_written(one_after_the_other, *rest, k_scale=0.5, v_scale=2.0)
        got = turned_and_written(rotary_kv_write.cpu, *rest, k_scale=0.5, v_scale=2.0)
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "fp8_e4m3"])
def test_a_token_is_written_alike_alone_and_with_its_neighbours(kind, assert_same_bits):
    layout, cache, heads = new_step(torch.bfloat16, 64, 128, kind)
    positions, slots = torch.arange(64), torch.arange(64)
    together = turned_and_written(rotary_kv_write.cpu, positions, heads, table(128), None, cache, slots, layout)
    alone = cache
    for i in range(64):
        q, alone = turned_and_written(
            rotary_kv_write.cpu, positions[i : i + 1], [x[i : i + 1] for x in heads], table(128), None, alone,
            slots[i : i + 1], layout,
        )  # fmt: skip
        assert_same_bits(q, together[0][i : i + 1].contiguous())
    assert_same_bits(alone, together[1])


def test_the_number_of_threads_changes_nothing(num_threads, assert_same_bits):
    layout, cache, heads = new_step(torch.bfloat16, 150, 64)
    rest = (torch.arange(150), heads, table(64), None, cache, torch.arange(150), layout)
    expected = turned_and_written(one_after_the_other, *rest)
    for got, wanted in zip(turned_and_written(rotary_kv_write.cpu, *rest), expected, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize(
    "position, slot, error",
    [(-1, 0, "rotary table"), (MAX_POSITION, 0, "rotary table"), (0, NUM_BLOCKS * BLOCK_SIZE, "320 slots"),
     (0, -2, "320 slots")],
)  # fmt: skip
def test_a_place_outside_its_table_is_refused_before_anything_is_done(position, slot, error):
    layout, cache, heads = new_step(torch.bfloat16, 2, 64)
    q, before = heads[0].clone(), cache.clone()
    with pytest.raises(IndexError, match=error):
        rotary_kv_write.cpu(
            torch.tensor([0, position]), *heads, table(64), None, cache, torch.tensor([0, slot]), layout=layout
        )
    assert torch.equal(cache, before) and torch.equal(q, heads[0])


def test_tensors_of_another_layout_are_refused():
    layout, cache, (q, k, v) = new_step(torch.bfloat16, 2, 64)
    places = torch.arange(2)
    with pytest.raises(ValueError, match="v is .*float32.*must be .*bfloat16"):
        rotary_kv_write.cpu(places, q, k, v.float(), table(64), None, cache, places, layout=layout)
    with pytest.raises(ValueError, match="q is"):
        wide = torch.zeros(2, 6, 80, dtype=q.dtype)
        rotary_kv_write.cpu(places, wide, k, v, table(64), None, cache, places, layout=layout)
    with pytest.raises(ValueError, match="kv_cache is"):
        rotary_kv_write.cpu(places, q, k, v, table(64), None, cache[..., :-16], places, layout=layout)


def test_the_kernel_is_preferred_on_a_cpu():
    assert rotary_kv_write.rotary_kv_write.select(OpSpec("cpu", torch.bfloat16)) is rotary_kv_write.cpu
