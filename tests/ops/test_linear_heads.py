"""A product whose heads are turned and written as they come: the bits of the product, then `rotary_kv_write`."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import kv_write, rms_norm, rotary, rotary_kv_write
from minivllm.ops.kv_layout import KV_TYPES, KvLayout
from minivllm.ops.linear import PackedLinear
from minivllm.ops.linear_int4 import PackedInt4Linear
from minivllm.ops.linear_int8 import PackedInt8Linear

NUM_BLOCKS, BLOCK_SIZE, MAX_POSITION, HIDDEN = 26, 64, 2048, 72
WEIGHTS = [PackedLinear, PackedInt8Linear, PackedInt4Linear]
OWN_ISAS = ("avx512_vnni", "avx512_bf16")
pytestmark = pytest.mark.usefixtures("isa")


def table(rot_dim):
    angles = torch.arange(MAX_POSITION)[:, None] * 10000.0 ** -(torch.arange(rot_dim // 2) / (rot_dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


class Step:
    """A projection, some rows of its input, and where these go: 0.5 and 2 are the scales of an fp8 cache."""

    def __init__(self, num_rows, head_dim, dtype, cls=PackedLinear, kind="bfloat16", heads=(3, 1), rot_dim=None):
        self.layout = KvLayout(kind, heads[1], head_dim, BLOCK_SIZE)
        self.split = [heads[0], heads[1], heads[1]]
        width = sum(self.split) * head_dim
        self.packed = cls(width, HIDDEN, dtype)
        self.packed.load_rows(0, torch.randn(width, HIDDEN).to(dtype))
        self.x = torch.randn(num_rows, HIDDEN).to(dtype)
        self.norms = rotary.HeadNorms(torch.rand(head_dim).to(dtype), torch.rand(head_dim).to(dtype), 1e-6)
        self.cos_sin = table(rot_dim or head_dim)
        self.positions, self.slots = torch.randint(0, MAX_POSITION, (num_rows,)), torch.arange(3, 3 + num_rows)
        self.slots[40:41] = -1
        self.slots[70:] += 29  # neighbours that begin half a tile
        self.cache = torch.randint(0, 256, self.layout.shape(NUM_BLOCKS), dtype=torch.uint8)

    def place(self):
        return kv_write.KvPlace(self.cache.clone(), self.slots, self.layout, 0.5, 2.0)

    def behind(self, bias=None, addend=None, norms=None, norm=None):
        """Queries and cache when norms, rotation and write follow the product."""
        place = self.place()
        x = self.x if norm is None else rms_norm.cpu(self.x, norm.weight, norm.eps)
        heads = self.packed(x, bias, addend=addend).view(len(self.x), sum(self.split), self.layout.head_dim)
        q, k, v = heads.split(self.split, dim=1)
        scales = {"k_scale": place.k_scale, "v_scale": place.v_scale}
        rest = (self.cos_sin, norms, place.kv_cache, self.slots)
        rotary_kv_write.cpu(self.positions, q, k, v, *rest, layout=self.layout, **scales)
        return q.contiguous(), place.kv_cache

    def within(self, bias=None, addend=None, norms=None, norm=None):
        """The same when they are part of it."""
        place = self.place()
        turn = rotary.Turn(self.positions, self.cos_sin, norms)
        return self.packed.turn_and_write(self.x, bias, turn, place, addend=addend, norm=norm), place.kv_cache


@pytest.fixture
def assert_alike(assert_same_bits):
    def check(step, **given):
        for got, expected in zip(step.within(**given), step.behind(**given), strict=True):
            assert_same_bits(got, expected)

    return check


@pytest.mark.parametrize("num_rows", [0, 1, 17, 150])
@pytest.mark.parametrize("head_dim", [48, 80, 128])
@pytest.mark.parametrize("cls", WEIGHTS)
def test_it_is_the_product_and_then_the_rotation_and_the_write(cls, head_dim, num_rows, dtype, assert_alike):
    for heads in ((4, 2), (3, 1)):
        step = Step(num_rows, head_dim, dtype, cls, heads=heads)
        assert_alike(step, norms=step.norms)
        bias, addend = torch.randn(step.packed.out_features), torch.randn(num_rows, step.packed.out_features)
        assert_alike(step, bias=bias.to(dtype), addend=addend)


@pytest.mark.parametrize("cls", WEIGHTS)
def test_the_norm_before_the_product_may_be_part_of_it(cls, dtype, assert_alike):
    for num_rows, weight_dtype in ((1, dtype), (17, torch.float32), (150, dtype)):
        weight = (1 + torch.randn(HIDDEN) / 10).to(weight_dtype)
        step = Step(num_rows, 64, dtype, cls)
        assert_alike(step, norms=step.norms, norm=rms_norm.RowNorm(weight, 1e-6))


@pytest.mark.parametrize("kind", KV_TYPES)
@pytest.mark.parametrize("head_dim, rot_dim", [(128, 128), (48, 16)])
def test_caches_of_every_type_are_written(kind, head_dim, rot_dim, dtype, assert_alike):
    step = Step(150, head_dim, dtype, kind=kind, rot_dim=rot_dim)
    assert_alike(step)
    assert_alike(step, norms=step.norms)


@pytest.mark.parametrize("cls", WEIGHTS)
def test_a_prompt_of_blocks_that_are_one_threads_each(cls, assert_alike):
    step = Step(1500, 128, torch.bfloat16, cls, heads=(2, 2))  # 320 rows are the most of a block
    addend = torch.randn(1500, step.packed.out_features)
    assert_alike(step, addend=addend, norms=step.norms)


@pytest.mark.parametrize("num_rows, is_left", [(1, False), (2, True), (64, True), (65, False)])
@pytest.mark.parametrize("cls", WEIGHTS)
def test_few_rows_leave_keys_and_values_to_attention(cls, num_rows, is_left, assert_same_bits):
    step = Step(num_rows, 64, torch.bfloat16, cls, heads=(4, 2))
    step.slots[40:41] = 2
    kept = torch.full((num_rows, 4, 64), -7.0, dtype=torch.bfloat16)
    place = step.place()._replace(kept=kept, k_scale=1.0, v_scale=1.0)
    turn = rotary.Turn(step.positions, step.cos_sin, step.norms)
    q = step.packed.turn_and_write(step.x, None, turn, place)
    expected_q, expected = step.behind(norms=step.norms)
    assert_same_bits(q, expected_q)
    if is_left:
        assert_same_bits(place.kv_cache, step.cache)
        kv_write.cpu(*kept.chunk(2, dim=1), place.kv_cache, step.slots, layout=step.layout)
    else:
        assert (kept == -7).all()
    assert_same_bits(place.kv_cache, expected)


def test_the_number_of_threads_changes_nothing(num_threads, assert_alike):
    for num_rows in (1, 40, 800):
        step = Step(num_rows, 64, torch.bfloat16, heads=(8, 4))
        assert_alike(step, norms=step.norms)


@pytest.mark.parametrize("position, slot", [(-1, 0), (MAX_POSITION, 0), (0, NUM_BLOCKS * BLOCK_SIZE), (0, -2)])
def test_a_place_outside_its_table_is_refused_before_anything_is_done(position, slot):
    step = Step(2, 64, torch.bfloat16)
    step.positions[1], step.slots[1] = position, slot
    place = step.place()
    with pytest.raises(IndexError, match="rotary table|slots"):
        step.packed.turn_and_write(step.x, None, rotary.Turn(step.positions, step.cos_sin, None), place)
    assert torch.equal(place.kv_cache, step.cache)


def test_what_does_not_fit_is_refused():
    step = Step(2, 64, torch.bfloat16)
    turn = rotary.Turn(step.positions, step.cos_sin, None)
    with pytest.raises(ValueError, match="heads of 48"):
        layout = KvLayout("bfloat16", 1, 48, BLOCK_SIZE)
        step.packed.turn_and_write(step.x, None, turn, step.place()._replace(layout=layout))
    with pytest.raises(ValueError, match="kv_cache is"):
        step.packed.turn_and_write(step.x, None, turn, step.place()._replace(kv_cache=step.cache[..., :-16]))
    with pytest.raises(ValueError, match="positions"):
        step.packed.turn_and_write(step.x, None, turn._replace(positions=step.positions[:1]), step.place())
    with pytest.raises(ValueError, match="q_weight is"):
        norms = rotary.HeadNorms(torch.ones(32), torch.ones(32), 1e-6)
        step.packed.turn_and_write(step.x, None, turn._replace(norms=norms), step.place())
