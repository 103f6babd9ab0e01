"""Writing keys and values into the paged cache: the native kernel against the reference, to the bit."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import kv_write, native
from minivllm.ops.op import OpSpec

needs_kernels = pytest.mark.skipif(
    native.why_not(OpSpec("cpu", torch.float32)) is not None, reason="no kernels"
)


def new_cache(dtype, num_blocks=5, num_kv_heads=3, block_size=32, head_dim=48):
    return torch.randn(num_blocks, 2, num_kv_heads, block_size, head_dim).to(dtype)


def new_tokens(dtype, num_tokens, num_kv_heads=3, head_dim=48):
    """k and v as they come out of a fused projection: views with a gap between tokens."""
    qkv = torch.randn(num_tokens, 4 * num_kv_heads, head_dim).to(dtype)
    return qkv[:, 2 * num_kv_heads : 3 * num_kv_heads], qkv[:, 3 * num_kv_heads :]


def write(implementation, cache, k, v, slots):
    cache = cache.clone()
    implementation(k, v, cache, slots)
    return cache


@needs_kernels
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 150])
def test_the_kernel_writes_what_the_reference_writes(dtype, num_tokens, num_threads, assert_same_bits):
    cache, (k, v) = new_cache(dtype), new_tokens(dtype, num_tokens)
    slots = torch.randperm(5 * 32)[:num_tokens]
    assert_same_bits(write(kv_write.cpu, cache, k, v, slots), write(kv_write.reference, cache, k, v, slots))


@pytest.mark.parametrize(
    "implementation", [kv_write.reference, pytest.param(kv_write.cpu, marks=needs_kernels)]
)
def test_a_token_lands_in_its_slot_and_nothing_else_changes(implementation):
    before, (k, v) = new_cache(torch.float32), new_tokens(torch.float32, 1)
    after = write(implementation, before, k, v, torch.tensor([2 * 32 + 5]))
    assert torch.equal(after[2, 0, :, 5], k[0]) and torch.equal(after[2, 1, :, 5], v[0])
    after[2, :, :, 5] = before[2, :, :, 5]
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    "implementation", [kv_write.reference, pytest.param(kv_write.cpu, marks=needs_kernels)]
)
def test_slot_minus_one_is_skipped(implementation):
    before, (k, v) = new_cache(torch.float32), new_tokens(torch.float32, 3)
    after = write(implementation, before, k, v, torch.tensor([-1, 0, -1]))
    assert torch.equal(after[0, 0, :, 0], k[1])
    after[0, :, :, 0] = before[0, :, :, 0]
    assert torch.equal(after, before)


@needs_kernels
@pytest.mark.parametrize("slot", [5 * 32, -2, 1 << 40])
def test_a_slot_outside_the_cache_is_refused_before_anything_is_written(slot):
    before, (k, v) = new_cache(torch.float32), new_tokens(torch.float32, 2)
    after = before.clone()
    with pytest.raises(IndexError, match=f"slot_mapping.1. = {slot}.*160 slots"):
        kv_write.cpu(k, v, after, torch.tensor([0, slot]))
    assert torch.equal(after, before)


@needs_kernels
def test_a_cache_of_another_dtype_is_refused():
    k, v = new_tokens(torch.bfloat16, 1)
    with pytest.raises(ValueError, match="k is .*bfloat16.*must be .*float32"):
        kv_write.cpu(k, v, new_cache(torch.float32), torch.tensor([0]))


@needs_kernels
def test_the_kernel_is_preferred_on_a_cpu():
    assert kv_write.kv_write.select(OpSpec("cpu", torch.bfloat16)) is kv_write.cpu
