"""Keys and values that a step leaves to attention: outputs and cache are those of a write before it, to the bit."""

from __future__ import annotations

import pytest
import torch

from minivllm.ops import kv_write, paged_attention
from minivllm.ops.kv_layout import KvLayout
from minivllm.ops.paged_attention import Options, SharedPrefixes

BLOCK_SIZE, NAN = 64, 0xFF
pytestmark = pytest.mark.usefixtures("isa")


class Batch:
    """(seq_len, query rows) of each request; the first `num_shared` tokens of all lie in the blocks of the first."""

    def __init__(self, requests, dtype, *, heads=4, kv_heads=2, head_dim=48, num_shared=0):
        self.seq_lens, self.q_lens = zip(*requests, strict=True)
        self.layout = KvLayout("bfloat16", kv_heads, head_dim, BLOCK_SIZE)
        num_blocks = [-(-n // BLOCK_SIZE) for n in self.seq_lens]
        order = torch.randperm(sum(num_blocks)).to(torch.int32)
        self.table = torch.full((len(requests), max(num_blocks)), -1, dtype=torch.int32)
        self.shared, old, new = None, [], []
        for b, (seq_len, q_len) in enumerate(requests):
            self.table[b, : num_blocks[b]] = order[sum(num_blocks[:b]) :][: num_blocks[b]]
            self.table[b, : num_shared // BLOCK_SIZE] = self.table[0, : num_shared // BLOCK_SIZE]
            p = torch.arange(seq_len)
            slots = self.table[b].long()[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            old.append(slots[num_shared if b else 0 : seq_len - q_len])
            new.append(slots[seq_len - q_len :])
        if num_shared:
            ends = torch.tensor([0, len(requests)], dtype=torch.int32)
            members = torch.arange(len(requests), dtype=torch.int32)
            self.shared = SharedPrefixes(members, ends, torch.tensor([num_shared], dtype=torch.int32))
        self.new, old = torch.cat(new), torch.cat(old)
        self.q = torch.randn(len(self.new), heads, head_dim).to(dtype)
        self.kept = torch.randn(len(self.new), 2 * kv_heads, head_dim).to(dtype)
        self.cache = torch.full(self.layout.shape(len(order)), NAN, dtype=torch.uint8)
        rows = torch.randn(2, len(old), kv_heads, head_dim).to(dtype)
        kv_write.reference(*rows, self.cache, old, layout=self.layout)

    def attend(self, cache, *, implementation=None, write=None, sliding_window=None):
        starts = torch.tensor([0, *self.q_lens]).cumsum(0, dtype=torch.int32)
        return (implementation or paged_attention.cpu)(
            self.q, cache, self.table, torch.tensor(self.seq_lens, dtype=torch.int32), starts,
            layout=self.layout, options=Options(0.3, sliding_window), shared=self.shared, write=write,
        )  # fmt: skip

    def within(self, **given):
        cache = self.cache.clone()
        place = kv_write.KvPlace(cache, self.new, self.layout, kept=self.kept)
        return self.attend(cache, write=place, **given), cache

    def behind(self, **given):
        cache = self.cache.clone()
        kv_write.reference(*self.kept.chunk(2, dim=1), cache, self.new, layout=self.layout)
        return self.attend(cache, **given), cache


@pytest.fixture
def assert_alike(assert_same_bits):
    def check(batch, **given):
        for got, expected in zip(batch.within(**given), batch.behind(**given), strict=True):
            assert_same_bits(got, expected)

    return check


DECODES = [(n, 1) for n in (1, 2, 31, 32, 33, 128, 129, 200, 1024, 1025, 2100)]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (16, 8), (8, 2), (20, 1), (21, 3)])
@pytest.mark.parametrize("head_dim", [48, 128])
def test_decodes_write_their_keys_and_values(heads, kv_heads, head_dim, dtype, assert_alike):
    assert_alike(Batch(DECODES, dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim))


def test_prompts_beside_them_are_written_as_well(dtype, assert_alike):
    assert_alike(Batch([(200, 1), (20, 20), (300, 17), (33, 1)], dtype))


def test_a_long_request_walked_in_parts(assert_alike):
    assert_alike(Batch([(4001, 1), (70, 1)], torch.bfloat16, heads=2, kv_heads=1))


@pytest.mark.parametrize("sliding_window", [1, 40, 1100])
def test_windows(sliding_window, assert_alike):
    assert_alike(Batch(DECODES, torch.bfloat16), sliding_window=sliding_window)


def test_requests_that_share_a_prefix(assert_alike):
    assert_alike(Batch([(257 + 13 * i, 1) for i in range(9)], torch.bfloat16, num_shared=256))


def test_a_key_that_lies_in_a_shared_prefix_is_there_for_all_who_share_it(assert_alike):
    assert_alike(Batch([(256, 1), (300, 1), (270, 1)], torch.bfloat16, num_shared=256))


def test_rows_of_no_request_are_written_as_well(dtype, assert_same_bits):
    batch = Batch([(50, 1), (60, 1), (70, 1), (80, 1)], dtype)
    starts = torch.tensor([1, 2, 3], dtype=torch.int32)  # the second's and the third's
    tables, lens = batch.table[1:3].contiguous(), torch.tensor(batch.seq_lens[1:3], dtype=torch.int32)
    options = Options(0.3, None)
    cache, (_, expected) = batch.cache.clone(), batch.behind()
    place = kv_write.KvPlace(cache, batch.new, batch.layout, kept=batch.kept)
    out = paged_attention.cpu(
        batch.q, cache, tables, lens, starts, layout=batch.layout, options=options, write=place
    )
    assert_same_bits(cache, expected)
    behind = paged_attention.cpu(batch.q, expected, tables, lens, starts, layout=batch.layout, options=options)
    assert_same_bits(out, behind)


def test_the_number_of_threads_changes_nothing(num_threads, assert_alike):
    assert_alike(Batch(DECODES, torch.bfloat16, heads=16, kv_heads=8, head_dim=128))


@pytest.mark.parametrize("implementation", [paged_attention.cpu, paged_attention.reference])
@pytest.mark.parametrize("num_rows, is_left", [(1, False), (2, True), (64, True), (65, False)])
def test_of_one_row_or_of_many_nothing_is_left(num_rows, is_left, implementation, assert_same_bits):
    batch = Batch([(100 + i, 1) for i in range(num_rows)], torch.bfloat16)
    _, cache = batch.within(implementation=implementation)
    assert_same_bits(cache, batch.behind()[1] if is_left else batch.cache)


def test_what_has_no_slot_is_not_written(assert_same_bits):
    batch = Batch([(50, 1), (60, 1), (70, 1)], torch.bfloat16)
    batch.new[1] = -1
    for _, cache in (batch.within(), batch.within(implementation=paged_attention.reference)):
        assert_same_bits(cache, batch.behind()[1])


def test_the_reference_writes_the_same(assert_same_bits):
    batch = Batch(DECODES, torch.bfloat16)
    assert_same_bits(batch.within(implementation=paged_attention.reference)[1], batch.behind()[1])


def test_a_slot_outside_the_cache_is_refused(assert_same_bits):
    batch = Batch([(50, 1), (60, 1)], torch.bfloat16)
    batch.new[1] = batch.cache.shape[0] * BLOCK_SIZE
    cache = batch.cache.clone()
    with pytest.raises(IndexError, match="slot_mapping"):
        batch.attend(cache, write=kv_write.KvPlace(cache, batch.new, batch.layout, kept=batch.kept))
    assert_same_bits(cache, batch.cache)
