"""Writing keys and values into the paged cache: the native kernel against the reference, to the bit, for each type."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import kv_write, native
from minivllm.ops.kv_layout import KV_TYPES, KvLayout
from minivllm.ops.op import OpSpec

needs_kernels = pytest.mark.skipif(
    native.why_not(OpSpec("cpu", torch.float32)) is not None, reason="no kernels"
)
IMPLEMENTATIONS = [kv_write.reference, pytest.param(kv_write.cpu, marks=needs_kernels)]
NUM_BLOCKS, BLOCK_SIZE = 5, 64
NUM_SLOTS = NUM_BLOCKS * BLOCK_SIZE


@pytest.fixture(params=KV_TYPES)
def layout(request):
    return KvLayout(request.param, num_kv_heads=3, head_dim=48, block_size=BLOCK_SIZE)


def new_cache(layout):
    return torch.randint(0, 256, layout.shape(NUM_BLOCKS), dtype=torch.uint8)


def new_tokens(dtype, num_tokens, num_kv_heads=3, head_dim=48):
    """k and v as they come out of a fused projection: views with a gap between tokens."""
    qkv = torch.randn(num_tokens, 4 * num_kv_heads, head_dim).to(dtype)
    return qkv[:, 2 * num_kv_heads : 3 * num_kv_heads], qkv[:, 3 * num_kv_heads :]


def write(implementation, cache, k, v, slots, layout, **scales):
    cache = cache.clone()
    implementation(k, v, cache, slots, layout=layout, **scales)
    return cache


def read(cache, layout, slot):
    """The key and the value in a slot, [num_kv_heads, head_dim] each."""
    block, token = divmod(slot, BLOCK_SIZE)
    return [layout.read(cache[block : block + 1], half, 1.0)[0, :, token] for half in (0, 1)]


@needs_kernels
@pytest.mark.parametrize("num_tokens", [0, 7, 150])
def test_the_kernel_writes_what_the_reference_writes(isa, dtype, layout, num_tokens, assert_same_bits):
    cache, (k, v) = new_cache(layout), new_tokens(dtype, num_tokens)
    slots = torch.randperm(NUM_SLOTS)[:num_tokens]
    expected = write(kv_write.reference, cache, k, v, slots, layout)
    assert_same_bits(write(kv_write.cpu, cache, k, v, slots, layout), expected)


@needs_kernels
@pytest.mark.parametrize("first", [0, 16, 5, 31])
@pytest.mark.parametrize("head_dim", [48, 64])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "fp8_e4m3"])
def test_neighbours_are_written_together_to_the_same_bytes(isa, dtype, kind, first, head_dim, assert_same_bits):
    layout = KvLayout(kind, num_kv_heads=3, head_dim=head_dim, block_size=BLOCK_SIZE)
    cache, (k, v) = new_cache(layout), new_tokens(dtype, 150, head_dim=head_dim)
    slots = torch.arange(first, first + 150)
    slots[70:] += 32
    slots[40], slots[100] = -1, 300
    expected = write(kv_write.reference, cache, k, v, slots, layout)
    assert_same_bits(write(kv_write.cpu, cache, k, v, slots, layout), expected)


@needs_kernels
def test_the_number_of_threads_changes_nothing(layout, num_threads, assert_same_bits):
    cache, (k, v), slots = new_cache(layout), new_tokens(torch.bfloat16, 300), torch.arange(300)
    expected = write(kv_write.reference, cache, k, v, slots, layout)
    assert_same_bits(write(kv_write.cpu, cache, k, v, slots, layout), expected)


@needs_kernels
@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "int8"])
def test_every_size_of_number_is_rounded_as_the_reference_rounds_it(isa, kv_dtype, assert_same_bits):
    layout = KvLayout(kv_dtype, num_kv_heads=1, head_dim=256, block_size=BLOCK_SIZE)
    exponents = torch.linspace(-16, 12, 256)
    k = (2**exponents * torch.randn(60, 1, 256)).float()
    k[0], k[1, 0, :5] = 0, torch.tensor([0.0, -0.0, 448, 464.1, -1e30])
    k[2:10] = k[2:10].mul(512).round().div(512)  # fp8's ties, and its subnormals
    scales = {"k_scale": 0.3, "v_scale": 1.0}
    cache, slots = new_cache(layout), torch.arange(60)
    expected = write(kv_write.reference, cache, k, -k, slots, layout, **scales)
    assert_same_bits(write(kv_write.cpu, cache, k, -k, slots, layout, **scales), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_lands_in_its_slot_and_nothing_else_changes(implementation, layout):
    before, (k, v) = torch.zeros_like(new_cache(layout)), new_tokens(torch.float32, 1)
    after = write(implementation, before, k, v, torch.tensor([2 * BLOCK_SIZE + 37]), layout)
    tolerance = {"float32": 0, "float16": 1e-3, "bfloat16": 1e-2, "int8": 2e-2, "fp8_e4m3": 7e-2}[
        layout.dtype
    ]
    for got, expected in zip(read(after, layout, 2 * BLOCK_SIZE + 37), (k[0], v[0])):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    for slot in range(NUM_SLOTS):
        if slot != 2 * BLOCK_SIZE + 37:
            assert all(rows.eq(0).all() for rows in read(after, layout, slot))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slot_minus_one_is_skipped(implementation, layout, assert_same_bits):
    before, (k, v) = new_cache(layout), new_tokens(torch.float32, 3)
    after = write(implementation, before, k, v, torch.tensor([-1, 0, -1]), layout)
    assert_same_bits(after, write(implementation, before, k[1:2], v[1:2], torch.tensor([0]), layout))


def test_a_scale_of_int8_is_its_tokens_and_heads_own(assert_same_bits):
    layout = KvLayout("int8", num_kv_heads=2, head_dim=16, block_size=BLOCK_SIZE)
    k = torch.randn(3, 2, 16)
    k[1, 0] *= 1000
    together = write(kv_write.reference, new_cache(layout).zero_(), k, k, torch.arange(3), layout)
    for token in range(3):
        alone = write(kv_write.reference, new_cache(layout).zero_(), k[token : token + 1], k[token : token + 1],
                      torch.tensor([token]), layout)  # fmt: skip
        for one, other in zip(read(together, layout, token), read(alone, layout, token)):
            assert_same_bits(one, other)
            torch.testing.assert_close(one, k[token], rtol=0, atol=float(k[token].abs().max()) / 250)
            assert one.abs().amax(-1).allclose(k[token].abs().amax(-1))


@needs_kernels
@pytest.mark.parametrize("slot", [NUM_SLOTS, -2, 1 << 40])
def test_a_slot_outside_the_cache_is_refused_before_anything_is_written(layout, slot):
    before, (k, v) = new_cache(layout), new_tokens(torch.float32, 2)
    after = before.clone()
    with pytest.raises(IndexError, match=f"slot_mapping.1. = {slot}.*{NUM_SLOTS} slots"):
        kv_write.cpu(k, v, after, torch.tensor([0, slot]), layout=layout)
    assert torch.equal(after, before)


@needs_kernels
def test_tensors_of_another_layout_are_refused(layout):
    k, v = new_tokens(torch.bfloat16, 1)
    with pytest.raises(ValueError, match="kv_cache is .*uint8"):
        kv_write.cpu(k, v, new_cache(layout)[..., :-16], torch.tensor([0]), layout=layout)
    with pytest.raises(ValueError, match="v is .*float32.*must be .*bfloat16"):
        kv_write.cpu(k, v.float(), new_cache(layout), torch.tensor([0]), layout=layout)


@needs_kernels
def test_the_kernel_is_preferred_on_a_cpu():
    assert kv_write.kv_write.select(OpSpec("cpu", torch.bfloat16)) is kv_write.cpu
