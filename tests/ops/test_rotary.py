"""Rotary embedding: the native kernel against the reference, whole and partial rotations, strided heads."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import rms_norm, rotary
from minivllm.ops.op import OpSpec

MAX_POSITION = 64
pytestmark = pytest.mark.usefixtures("isa")


def table(rot_dim):
    angles = torch.arange(MAX_POSITION)[:, None] * 10000.0 ** -(torch.arange(rot_dim // 2) / (rot_dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def heads(num_tokens, num_heads, head_dim, dtype):
    return torch.randn(num_tokens, num_heads, head_dim).to(dtype)


@pytest.mark.parametrize("head_dim, rot_dim", [(16, 16), (80, 80), (128, 128), (64, 32), (24, 6)])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 40])
def test_the_kernel_agrees_with_the_reference(dtype, num_tokens, head_dim, rot_dim, assert_same_bits):
    positions = torch.randint(0, MAX_POSITION, (num_tokens,))
    q, k = heads(num_tokens, 4, head_dim, dtype), heads(num_tokens, 2, head_dim, dtype)
    expected_q, expected_k = q.clone(), k.clone()
    rotary.reference(positions, expected_q, expected_k, table(rot_dim))
    rotary.cpu(positions, q, k, table(rot_dim))
    assert_same_bits(q, expected_q)  # the same operations, rounded alike
    assert_same_bits(k, expected_k)


def test_position_zero_changes_nothing(dtype, assert_same_bits):
    q, k = heads(3, 2, 16, dtype), heads(3, 1, 16, dtype)
    rotated = q.clone()
    rotary.cpu(torch.zeros(3, dtype=torch.int64), rotated, k, table(16))
    assert_same_bits(rotated, q)


def test_scores_depend_on_the_distance_between_positions_alone():
    q, k = heads(1, 1, 32, torch.float32), heads(1, 1, 32, torch.float32)

    def score(q_position, k_position):
        a, b = q.clone(), k.clone()
        rotary.cpu(torch.tensor([q_position]), a, b.clone(), table(32))
        rotary.cpu(torch.tensor([k_position]), a.clone(), b, table(32))
        return (a * b).sum()

    torch.testing.assert_close(score(9, 4), score(45, 40), rtol=1e-4, atol=1e-4)


def test_heads_inside_the_qkv_matrix_are_rotated_where_they_lie(dtype, num_threads, assert_same_bits):
    qkv = torch.randn(30, (4 + 2 + 2) * 16).to(dtype)
    before = qkv.clone()
    positions = torch.arange(30)
    q, k = before[:, :64].unflatten(1, (4, 16)).clone(), before[:, 64:96].unflatten(1, (2, 16)).clone()
    rotary.cpu(positions, q, k, table(16))
    rotary.cpu(positions, qkv[:, :64].unflatten(1, (4, 16)), qkv[:, 64:96].unflatten(1, (2, 16)), table(16))
    assert_same_bits(qkv, torch.cat([q.flatten(1), k.flatten(1), before[:, 96:]], dim=1))


@pytest.mark.parametrize("position", [-1, MAX_POSITION])
def test_a_position_outside_the_table_is_an_error(position):
    for implementation in (rotary.cpu, rotary.reference):
        with pytest.raises(IndexError, match="outside the rotary table"):
            implementation(torch.tensor([position]), torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), table(16))


def test_heads_narrower_than_the_rotation_are_refused():
    with pytest.raises(ValueError, match="q is"):
        rotary.cpu(torch.tensor([0]), torch.zeros(1, 1, 8), torch.zeros(1, 1, 16), table(16))


def test_the_kernel_is_preferred_on_a_cpu():
    assert rotary.rotary.select(OpSpec("cpu", torch.float16)) is rotary.cpu


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("implementation", [rotary.cpu, rotary.reference])
def test_heads_normed_on_the_way_equal_heads_normed_before(dtype, head_dim, implementation, assert_same_bits):
    qkv = torch.randn(40, 8, head_dim).to(dtype)  # views of one, as a model has them
    norms = rotary.HeadNorms(torch.rand(head_dim).to(dtype), torch.rand(head_dim).to(dtype), 1e-6)
    positions = torch.randint(0, MAX_POSITION, (40,))
    norm = rms_norm.cpu if implementation is rotary.cpu else rms_norm.reference
    expected_q, expected_k = norm(qkv[:, :4], norms.q_weight, 1e-6), norm(qkv[:, 4:6], norms.k_weight, 1e-6)
    implementation(positions, expected_q, expected_k, table(head_dim))
    values = qkv[:, 6:].clone()
    implementation(positions, qkv[:, :4], qkv[:, 4:6], table(head_dim), norms)
    assert_same_bits(qkv[:, :4].contiguous(), expected_q)
    assert_same_bits(qkv[:, 4:6].contiguous(), expected_k)
    assert_same_bits(qkv[:, 6:].contiguous(), values)


def test_a_norm_of_another_size_is_refused(dtype):
    q, k = heads(3, 2, 16, dtype), heads(3, 1, 16, dtype)
    norms = rotary.HeadNorms(torch.ones(8, dtype=dtype), torch.ones(16, dtype=dtype), 1e-6)
    with pytest.raises(ValueError, match="q_weight"):
        rotary.cpu(torch.zeros(3, dtype=torch.int64), q, k, table(16), norms)
