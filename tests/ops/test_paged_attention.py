"""Paged attention: the native kernel against the reference, and the promises about a row's bits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from minivllm.ops import kv_write, native, paged_attention
from minivllm.ops.kv_layout import KV_TYPES, KvLayout
from minivllm.ops.op import OpSpec
from minivllm.ops.paged_attention import Options, SharedPrefixes

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
QUANTIZED = ["fp8_e4m3", "int8"]
NAN = 0xFF  # every byte of it: NaN in each type, int8's scales included
needs_kernels = pytest.mark.skipif(
    native.why_not(OpSpec("cpu", torch.float32)) is not None, reason="no kernels"
)


@dataclass
class Sequence:
    """One request's queries, keys and values at every position, [seq_len, heads, head_dim]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def __len__(self):
        return len(self.q)


def sequence(seq_len, *, heads=4, kv_heads=2, head_dim=32, dtype=torch.float32):
    shape = (seq_len, heads + 2 * kv_heads, head_dim)
    return Sequence(*torch.randn(shape).to(dtype).split([heads, kv_heads, kv_heads], dim=1))


def attend(
    requests,
    *,
    implementation=None,
    kv_dtype=None,
    block_size=32,
    shuffle=0,
    unused=NAN,
    num_shared=0,
    say_shared=True,
    out=None,
    **options,
):
    """Attention of a batch of (sequence, query positions) in a fresh cache; one output a request.

    Blocks are dealt in an order that `shuffle` decides; what no token was written to holds bytes `unused`. The
    first `num_shared` tokens of all requests lie in the blocks of the first one, which the kernel is told or not.
    """
    heads, head_dim = requests[0][0].q.shape[1:]
    dtype = requests[0][0].q.dtype
    layout = KvLayout(kv_dtype or NAMES[dtype], requests[0][0].k.shape[1], head_dim, block_size)
    options = Options(**{"scale": head_dim**-0.5, **options})
    seq_lens = [queries.stop for _, queries in requests]
    num_blocks = [-(-n // block_size) for n in seq_lens]
    order = torch.randperm(sum(num_blocks) + 3, generator=torch.Generator().manual_seed(shuffle)).to(
        torch.int32
    )
    cache = torch.full(layout.shape(len(order)), unused, dtype=torch.uint8)
    table = torch.full((len(requests), max(num_blocks)), -1, dtype=torch.int32)
    for b, (seq, queries) in enumerate(requests):
        start = sum(num_blocks[:b])
        table[b, : num_blocks[b]] = order[start : start + num_blocks[b]]
        table[b, : num_shared // block_size] = table[0, : num_shared // block_size]
        positions = torch.arange(queries.stop)
        slots = table[b].long()[positions // block_size] * block_size + positions % block_size
        kv_write.reference(
            seq.k[: queries.stop], seq.v[: queries.stop], cache, slots,
            layout=layout, k_scale=options.k_scale, v_scale=options.v_scale,
        )  # fmt: skip
    q = torch.cat([seq.q[queries.start : queries.stop] for seq, queries in requests])
    q_lens = [len(queries) for _, queries in requests]
    shared = None
    if num_shared and say_shared:
        shared = SharedPrefixes(ints(*range(len(requests))), ints(0, len(requests)), ints(num_shared))
    got = (implementation or paged_attention.cpu)(
        q,
        cache,
        table,
        ints(*seq_lens),
        ints(0, *q_lens).cumsum(0, dtype=torch.int32),
        layout=layout,
        options=options,
        shared=shared,
        out=out,
    )
    return got.split(q_lens)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def prefill(seq):
    return seq, range(len(seq))


def decode(seq):
    return seq, range(len(seq) - 1, len(seq))


def by_definition(seq, position, head, sliding_window=None):
    """One row of one head in float64, straight from the definition."""
    kv_head = head // (seq.q.shape[1] // seq.k.shape[1])
    first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
    k, v = seq.k[first : position + 1, kv_head].double(), seq.v[first : position + 1, kv_head].double()
    weights = (k @ seq.q[position, head].double() * seq.q.shape[2] ** -0.5).softmax(0)
    return weights @ v


# The reference ---------------------------------------------------------------


@pytest.mark.parametrize("sliding_window", [None, 1, 20])
def test_the_reference_is_causal_softmax_attention(sliding_window, assert_close):
    seq = sequence(70)
    (out,) = attend([prefill(seq)], implementation=paged_attention.reference, sliding_window=sliding_window)
    for position, head in [(0, 0), (31, 1), (32, 2), (69, 3)]:
        assert_close(out[position, head], by_definition(seq, position, head, sliding_window), 1e-6)


# The kernel against the reference --------------------------------------------


def assert_agrees(requests, assert_close, tolerance, **options):
    got = attend(requests, **options)
    expected = attend(requests, implementation=paged_attention.reference, **options)
    assert_close(torch.cat(got), torch.cat(expected), tolerance)


@needs_kernels
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128, 256])
def test_the_kernel_agrees_with_the_reference_for_each_head_dim(isa, dtype, head_dim, assert_close):
    one, other = sequence(75, head_dim=head_dim, dtype=dtype), sequence(33, head_dim=head_dim, dtype=dtype)
    assert_agrees([prefill(one), decode(other)], assert_close, TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_the_kernel_agrees_with_the_reference_for_each_group_size(isa, group, assert_close):
    seqs = [sequence(n, heads=2 * group, kv_heads=2, head_dim=48) for n in (97, 40)]
    assert_agrees([prefill(seqs[0]), decode(seqs[1])], assert_close, TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("seq_len", [1, 31, 32, 33, 64, 1023, 1024, 1025, 2100])
def test_the_kernel_agrees_with_the_reference_across_tile_and_segment_borders(isa, seq_len, assert_close):
    seq = sequence(seq_len, heads=2, kv_heads=1, head_dim=16)
    last_chunk = seq, range(max(0, seq_len - 40), seq_len)
    assert_agrees([decode(seq), last_chunk], assert_close, TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("sliding_window", [1, 5, 32, 33, 100, 1500])
def test_the_kernel_agrees_with_the_reference_in_a_sliding_window(isa, sliding_window, assert_close):
    seq = sequence(1300, heads=3, kv_heads=1, head_dim=16)
    chunks = [(seq, range(90)), (seq, range(1000, 1100)), decode(seq)]
    assert_agrees(chunks, assert_close, TOLERANCE[torch.float32], sliding_window=sliding_window)


@needs_kernels
def test_large_scores_do_not_overflow(isa, assert_close):
    seq = sequence(70)
    seq.q.mul_(200)
    assert_agrees([prefill(seq)], assert_close, 1e-4)


@needs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_softmax_weights_are_right_from_one_to_the_smallest(isa, dtype, tolerance):
    """Keys give scores of 0 down to -80, values show each position's weight."""
    positions = torch.arange(256)
    seq = sequence(256, heads=1, kv_heads=1, head_dim=256, dtype=dtype)
    scores = -(positions * 97 % 256) * 0.3125
    seq.q.zero_(), seq.k.zero_(), seq.v.zero_()
    seq.q[:, 0, 0] = 1
    seq.k[:, 0, 0] = scores.to(dtype)
    seq.v[positions, 0, positions] = 1
    (out,) = attend([decode(seq)], scale=1.0)
    expected = seq.k[:, 0, 0].double().softmax(0)
    assert ((out[0, 0].double() - expected).abs() / expected).max() < tolerance


@needs_kernels
def test_q_is_read_where_it_lies(assert_same_bits):
    seq = sequence(40)
    apart = Sequence(seq.q.contiguous(), seq.k, seq.v)
    assert not seq.q.is_contiguous()
    assert_same_bits(attend([prefill(seq)])[0], attend([prefill(apart)])[0])


@needs_kernels
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (80, 40), (128, 4)])
@pytest.mark.parametrize("kv_dtype", KV_TYPES)
def test_the_kernel_agrees_with_the_reference_for_each_type_of_cache(
    isa, dtype, kv_dtype, head_dim, group, assert_close
):
    """Both read what the cache stores: that is the reference's business, not a matter of tolerance."""
    shape = {"heads": 2 * group, "kv_heads": 2, "head_dim": head_dim, "dtype": dtype}
    seqs = [sequence(n, **shape) for n in (70, 45, 140)]
    tolerance = TOLERANCE[torch.float32 if dtype == torch.float32 else torch.bfloat16]
    scales = {"k_scale": 0.75, "v_scale": 1.5} if kv_dtype == "fp8_e4m3" else {}
    assert_agrees(
        [prefill(seqs[0]), decode(seqs[1]), decode(seqs[2])],
        assert_close,
        tolerance,
        kv_dtype=kv_dtype,
        **scales,
    )


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("bfloat16", 8e-3), ("fp8_e4m3", 6e-2), ("int8", 2e-2)])
def test_a_smaller_cache_costs_little_accuracy(kv_dtype, tolerance, assert_close):
    seq = sequence(200, head_dim=64)
    (exact,) = attend([prefill(seq)], implementation=paged_attention.reference)
    (got,) = attend([prefill(seq)], implementation=paged_attention.reference, kv_dtype=kv_dtype)
    assert_close(got[100:], exact[100:], tolerance)


def some_options(heads):
    slopes = 2.0 ** -torch.arange(1, heads + 1).float()
    return {
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": torch.linspace(-2, 3, heads)},
        "alibi": {"alibi_slopes": slopes},
        "all": {
            "softcap": 5.0,
            "sinks": torch.linspace(-2, 3, heads),
            "alibi_slopes": slopes,
            "sliding_window": 150,
        },
    }


@needs_kernels
@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("option", ["softcap", "sinks", "alibi", "all"])
def test_the_kernel_agrees_with_the_reference_with_each_option(isa, dtype, kv_dtype, option, assert_close):
    seqs = [sequence(n, heads=6, kv_heads=2, dtype=dtype) for n in (1100, 300)]
    chunks = [(seqs[0], range(1030, 1100)), prefill(seqs[1]), decode(seqs[1])]
    tolerance = TOLERANCE[torch.float32 if dtype == torch.float32 else torch.bfloat16]
    assert_agrees(chunks, assert_close, tolerance, kv_dtype=kv_dtype, **some_options(6)[option])


@pytest.mark.parametrize("option", ["softcap", "sinks", "alibi"])
def test_each_option_changes_what_it_is_about(option):
    seq = sequence(50, heads=4, kv_heads=2)
    plain, changed = (
        attend([prefill(seq)], implementation=paged_attention.reference, **options)[0]
        for options in ({}, some_options(4)[option])
    )
    assert not torch.allclose(plain[1:], changed[1:])


def test_a_sink_takes_its_share_of_a_lone_token():
    seq = sequence(1, heads=1, kv_heads=1)
    logit = (seq.q @ seq.k.mT).item() * 32**-0.5
    (out,) = attend([prefill(seq)], implementation=paged_attention.reference, sinks=torch.tensor([logit]))
    torch.testing.assert_close(out, seq.v / 2)


# A row's bits depend on nothing but its own query, keys and values -----------


@pytest.fixture
def crowd(dtype):
    """Requests of many shapes; the first is long enough for several segments."""
    seqs = [sequence(n, heads=6, kv_heads=2, head_dim=48, dtype=dtype) for n in (1111, 70, 33, 1, 400)]
    return [
        (seqs[0], range(1000, 1111)),
        prefill(seqs[1]),
        decode(seqs[2]),
        prefill(seqs[3]),
        decode(seqs[4]),
    ]


@needs_kernels
def test_a_request_has_the_same_bits_alone_and_in_a_crowd(isa, num_threads, crowd, assert_same_bits):
    for request, in_crowd in zip(crowd, attend(crowd)):
        assert_same_bits(attend([request])[0], in_crowd)


@needs_kernels
@pytest.mark.parametrize("sliding_window", [None, 45])
@pytest.mark.parametrize("num_requests", [1, 2, 12])  # 1 or 2 of five key-value heads a walk, or all (4 of codes)
@pytest.mark.parametrize(("heads", "head_dim"), [(5, 64), (15, 80)])
@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED])
def test_heads_that_are_walked_over_together_change_no_bit(
    isa, num_requests, heads, head_dim, kv_dtype, sliding_window, assert_same_bits
):
    lengths = [1, 40, 128, 161, 300, 1100]
    seqs = [
        sequence(lengths[-1 - i % 6], heads=heads, kv_heads=5, head_dim=head_dim, dtype=torch.bfloat16)
        for i in range(num_requests)
    ]
    together = attend([decode(seq) for seq in seqs], kv_dtype=kv_dtype, sliding_window=sliding_window)
    for seq, row in zip(seqs, together):
        (whole,) = attend([prefill(seq)], kv_dtype=kv_dtype, sliding_window=sliding_window)
        assert_same_bits(row[0], whole[-1])


@needs_kernels
@pytest.mark.parametrize("sliding_window", [None, 45])
@pytest.mark.parametrize("chunk", [1, 5, 32, 50, 64])
def test_a_prompt_has_the_same_bits_in_chunks_and_whole(isa, dtype, chunk, sliding_window, assert_same_bits):
    seq = sequence(130, heads=3, kv_heads=1, head_dim=32, dtype=dtype)
    (whole,) = attend([prefill(seq)], sliding_window=sliding_window)
    starts = range(0, len(seq), chunk)
    parts = [(seq, range(start, min(start + chunk, len(seq)))) for start in starts]
    for start, part in zip(starts, parts):
        (got,) = attend([part], sliding_window=sliding_window)
        assert_same_bits(got, whole[start : start + chunk])


@needs_kernels
@pytest.mark.parametrize("sliding_window", [None, 1100])
def test_a_long_prompt_has_the_same_bits_when_decoded_token_by_token(isa, sliding_window, assert_same_bits):
    seq = sequence(2260, heads=2, kv_heads=1, head_dim=16)
    (whole,) = attend([prefill(seq)], sliding_window=sliding_window)
    for position in (0, 31, 32, 1023, 1024, 1025, 1180, 1190, 2047, 2048, 2259):
        (row,) = attend([(seq, range(position, position + 1))], sliding_window=sliding_window)
        assert_same_bits(row[0], whole[position])


@needs_kernels
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_scores_that_grow_along_a_prompt_give_the_bits_of_decoding(isa, dtype, kv_dtype, assert_same_bits):
    """Every few hundred positions a row's maximum must move, also where it sees all of what is read at once."""
    seq = sequence(1300, heads=2, kv_heads=1, head_dim=32, dtype=dtype)
    seq.k.mul_((1 + torch.arange(1300) / 30).view(-1, 1, 1).to(dtype))
    (whole,) = attend([prefill(seq)], kv_dtype=kv_dtype)
    assert whole.isfinite().all()
    for position in (127, 128, 300, 511, 512, 700, 1023, 1024, 1151, 1299):
        (row,) = attend([(seq, range(position, position + 1))], kv_dtype=kv_dtype)
        assert_same_bits(row[0], whole[position])


@needs_kernels
@pytest.mark.parametrize("factor", [30, 3e7, float("nan"), float("inf")])
def test_one_row_of_large_or_broken_scores_changes_no_other(isa, dtype, factor, assert_same_bits):
    """Behind positions that all rows beside it see wholly, where maxima are not searched for, unless large."""
    seq, at = sequence(700, heads=2, kv_heads=1, head_dim=32, dtype=dtype), 610
    (expected,) = attend([prefill(seq)])
    seq.q[at] *= factor
    (got,) = attend([prefill(seq)])
    assert_same_bits(torch.cat([got[:at], got[at + 1 :]]), torch.cat([expected[:at], expected[at + 1 :]]))
    (alone,) = attend([(seq, range(at, at + 1))])
    if seq.q[at].isfinite().all():
        assert_same_bits(alone[0], got[at])
    else:
        assert got[at].isnan().any() and alone.isnan().any()


@needs_kernels
@pytest.mark.parametrize(("kv_dtype", "k_scale"), [("bfloat16", 1.0), ("fp8_e4m3", 1e9), ("int8", 1.0)])
def test_scores_of_any_size_give_weights_that_are_numbers(isa, kv_dtype, k_scale, assert_same_bits):
    """Where what is rounded of the largest score would be an exponent of hundreds."""
    seq = sequence(300, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    seq.k *= 1e9
    (whole,) = attend([prefill(seq)], kv_dtype=kv_dtype, k_scale=k_scale)
    assert whole.isfinite().all() and whole.abs().max() <= 1.1 * seq.v.abs().max()
    for position in (5, 127, 299):
        (alone,) = attend([(seq, range(position, position + 1))], kv_dtype=kv_dtype, k_scale=k_scale)
        assert_same_bits(alone[0], whole[position])


@needs_kernels
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_long_request_of_one_head_is_split_over_threads_and_changes_no_bit(
    isa, dtype, kv_dtype, assert_same_bits
):
    seqs = [sequence(n, heads=4, kv_heads=1, head_dim=32, dtype=dtype) for n in (3000, 1024, 2049, 700)]
    together = attend(
        [decode(seq) for seq in [*seqs, *seqs, *seqs]], kv_dtype=kv_dtype
    )  # enough for every thread
    before = native.lib.num_threads()
    for num_threads in (1, 2, 5):
        native.lib.set_num_threads(num_threads)
        for seq, expected in zip(seqs, together):
            assert_same_bits(attend([decode(seq)], kv_dtype=kv_dtype)[0], expected)
    native.lib.set_num_threads(before)


@needs_kernels
def test_physical_blocks_and_their_size_change_no_bit(isa, crowd, assert_same_bits):
    expected = torch.cat(attend(crowd))
    for block_size in (32, 64, 128):
        for shuffle in (1, 2):
            assert_same_bits(torch.cat(attend(crowd, block_size=block_size, shuffle=shuffle)), expected)


def sharing(num_shared, dtype):
    """Decoding requests whose first tokens are the same; more rows than walk together."""
    shape = {"heads": 16, "kv_heads": 1, "head_dim": 48, "dtype": dtype}
    batch = []
    for more in (200, 129, 64, 5, 1, 0):
        seq = sequence(num_shared + more, **shape)
        if batch:
            seq.k[:num_shared], seq.v[:num_shared] = batch[0][0].k[:num_shared], batch[0][0].v[:num_shared]
        batch.append(decode(seq))
    return batch


@needs_kernels
@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("num_shared", [128, 1024, 1280])
def test_shared_blocks_are_read_once_and_change_no_bit(isa, dtype, kv_dtype, num_shared, assert_same_bits):
    batch, options = sharing(num_shared, dtype), {"kv_dtype": kv_dtype, "block_size": 128}
    apart = torch.cat(attend(batch, **options))
    assert_same_bits(torch.cat(attend(batch, num_shared=num_shared, say_shared=False, **options)), apart)
    assert_same_bits(torch.cat(attend(batch, num_shared=num_shared, **options)), apart)


@needs_kernels
@pytest.mark.parametrize("option", ["softcap", "sinks", "alibi", "all"])
def test_shared_blocks_change_no_bit_with_any_option_or_number_of_threads(
    isa, num_threads, option, assert_same_bits
):
    batch, options = sharing(256, torch.bfloat16), {"block_size": 128, **some_options(16)[option]}
    apart = torch.cat(attend(batch, **options))
    assert_same_bits(torch.cat(attend(batch, num_shared=256, **options)), apart)


@needs_kernels
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_a_prompt_has_the_same_bits_in_chunks_whole_and_token_by_token_in_a_quantized_cache(
    isa, dtype, kv_dtype, assert_same_bits
):
    seq = sequence(1200, heads=4, kv_heads=2, head_dim=32, dtype=dtype)
    (whole,) = attend([prefill(seq)], kv_dtype=kv_dtype)
    for begin, end in [(0, 1), (31, 32), (32, 100), (1000, 1030), (1199, 1200), (128, 129)]:
        assert_same_bits(attend([(seq, range(begin, end))], kv_dtype=kv_dtype)[0], whole[begin:end])


@needs_kernels
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_a_long_prompt_of_which_not_all_is_kept_widened_has_the_bits_of_decoding(kv_dtype, assert_same_bits):
    """On AMX a thread keeps 16,384 positions of a head; here several walks pass over more."""
    seq = sequence(17_500, heads=4, kv_heads=1, head_dim=16, dtype=torch.bfloat16)
    (chunk,) = attend([(seq, range(17_300, 17_500))], kv_dtype=kv_dtype)
    for position in [17_300, 17_420, 17_499]:
        (alone,) = attend([(seq, range(position, position + 1))], kv_dtype=kv_dtype)
        assert_same_bits(alone, chunk[position - 17_300 : position - 17_299])


@needs_kernels
@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED])
def test_what_unused_slots_hold_changes_no_bit(isa, crowd, kv_dtype, assert_same_bits):
    expected = torch.cat(attend(crowd, kv_dtype=kv_dtype, unused=0))
    assert expected.isfinite().all()
    for unused in (NAN, 0x7F, 0xC1):
        assert_same_bits(torch.cat(attend(crowd, kv_dtype=kv_dtype, unused=unused)), expected)


@needs_kernels
def test_what_later_positions_hold_changes_no_bit(isa, dtype, assert_same_bits):
    seq = sequence(100, heads=1, kv_heads=1, dtype=dtype)
    calm = attend([prefill(seq)])[0][:50]
    seq.k[50:], seq.v[50:] = float("nan"), float("inf")
    assert_same_bits(attend([prefill(seq)])[0][:50], calm)


@needs_kernels
def test_what_lies_before_the_sliding_window_changes_no_bit(isa, dtype, assert_same_bits):
    seq = sequence(100, heads=1, kv_heads=1, dtype=dtype)
    calm = attend([prefill(seq)], sliding_window=20)[0][70:]
    seq.k[:51], seq.v[:51] = float("nan"), float("inf")
    assert_same_bits(attend([prefill(seq)], sliding_window=20)[0][70:], calm)


@needs_kernels
@pytest.mark.parametrize("chunk", [40, 8, 1])
def test_scores_that_overflow_below_let_nothing_in_that_a_row_does_not_see(isa, dtype, chunk):
    seq = sequence(40, dtype=dtype)
    seq.q[:], seq.k[:] = 1e30, -1e30
    if dtype == torch.float16:  # of a smaller range, in which no product overflows
        seq.q[:], seq.k[:] = torch.inf, -1.0
    parts = [(seq, range(start, start + chunk)) for start in range(0, len(seq), chunk)]
    for out in attend(parts, unused=0):
        assert out.isnan().all()


@needs_kernels
@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED])
def test_a_nan_in_its_own_keys_makes_a_row_nan(isa, dtype, kv_dtype):
    seq = sequence(40, heads=1, kv_heads=1, dtype=dtype)
    seq.k[35, 0, 3] = float("nan")
    (out,) = attend([prefill(seq)], kv_dtype=kv_dtype)
    assert out[:35].isfinite().all() and out[35:].isnan().all()


@needs_kernels
@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED])
def test_a_nan_in_its_own_values_reaches_the_rows_that_see_it_and_no_other(
    isa, dtype, kv_dtype, assert_same_bits
):
    seq = sequence(80, heads=2, kv_heads=1, dtype=dtype)
    (calm,) = attend([prefill(seq)], kv_dtype=kv_dtype)
    seq.v[35, 0, 3] = float("nan")
    (out,) = attend([prefill(seq)], kv_dtype=kv_dtype)
    assert_same_bits(out[:35], calm[:35])
    assert out[35:, :, 3].isnan().all()


@needs_kernels
def test_the_output_goes_where_the_caller_says(assert_same_bits):
    seq = sequence(40)
    out = torch.full((40, 4, 32), float("nan"))
    assert attend([prefill(seq)], out=out)[0].data_ptr() == out.data_ptr()
    assert_same_bits(out, attend([prefill(seq)])[0])


# Edges and refusals ----------------------------------------------------------


def small_batch():
    layout = KvLayout("float32", num_kv_heads=2, head_dim=16, block_size=32)
    cache = torch.randn(4, layout.block_bytes // 4).view(torch.uint8).view(layout.shape(4))
    return dict(
        q=torch.randn(3, 4, 16), kv_cache=cache, block_table=ints(1, 2).unsqueeze(0), seq_lens=ints(40),
        query_start_loc=ints(0, 3), layout=layout, options=Options(0.25),
    )  # fmt: skip


@needs_kernels
def test_rows_of_no_request_are_zero():
    out = paged_attention.cpu(**{**small_batch(), "query_start_loc": ints(0, 2)})
    assert out[:2].ne(0).all() and out[2].eq(0).all()


@needs_kernels
def test_a_request_without_query_rows_is_passed_over(assert_same_bits):
    batch = small_batch()
    table = torch.cat([batch["block_table"], ints(3, -1).unsqueeze(0)])
    padded = {**batch, "block_table": table, "seq_lens": ints(40, 0), "query_start_loc": ints(0, 3, 3)}
    assert_same_bits(paged_attention.cpu(**padded), paged_attention.cpu(**batch))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(block_table=ints(1, 4).unsqueeze(0)),
            IndexError,
            "block_table.1. = 4 lies outside .* 4 blocks",
        ),
        (dict(block_table=ints(-1, 2).unsqueeze(0)), IndexError, "block_table.0. = -1"),
        (dict(seq_lens=ints(65)), IndexError, "seq_lens.0. = 65"),
        (dict(seq_lens=ints(2)), IndexError, "seq_lens.0. = 2 is below the request's 3 query rows"),
        (dict(query_start_loc=ints(0, 4)), IndexError, "query_start_loc.1. = 4"),
        (dict(query_start_loc=ints(2, 1)), IndexError, "query_start_loc.1. = 1"),
        (dict(q=torch.randn(3, 3, 16)), ValueError, "3 query heads cannot share 2"),
        (dict(q=torch.randn(3, 4, 32)), ValueError, "q is .*32"),
        (dict(kv_cache=torch.zeros(4, 2, 2, 1, 16, dtype=torch.uint8)), ValueError, "kv_cache is"),
        (dict(options=Options(0.25, sinks=torch.zeros(3))), ValueError, "sinks is"),
        (dict(out=torch.empty(3, 4, 16).bfloat16()), ValueError, "out is .*bfloat16"),
        (dict(shared=SharedPrefixes(ints(1), ints(0, 1), ints(128))), IndexError, "members.0. = 1"),
        (dict(shared=SharedPrefixes(ints(0), ints(0, 1), ints(100))), ValueError, "shared_lens.0. = 100"),
        (dict(shared=SharedPrefixes(ints(0), ints(0, 1), ints(128))), ValueError, "has not one query row"),
        (dict(shared=SharedPrefixes(ints(0), ints(0, 2), ints(128))), IndexError, "group_starts.1. = 2"),
        (dict(seq_lens=torch.tensor([40])), ValueError, "seq_lens is .*int64.* must be .*int32"),
    ],
)
def test_what_would_read_outside_the_cache_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        paged_attention.cpu(**{**small_batch(), **change})


@needs_kernels
def test_the_kernel_says_which_sizes_it_does_not_serve():
    def why_not(**sizes):
        return paged_attention.cpu_why_not(OpSpec("cpu", torch.bfloat16, sizes))

    assert why_not(head_dim=80, block_size=128) is None
    assert "head_dim 72 is not a multiple of 16" in why_not(head_dim=72, block_size=128)
    assert "try --block-size 128" in why_not(head_dim=64, block_size=16)
    assert "65 query heads" in why_not(head_dim=64, block_size=32, group=65)


@needs_kernels
def test_the_reference_serves_what_the_kernel_does_not():
    spec = OpSpec("cpu", torch.float32, {"head_dim": 72, "block_size": 32})
    assert paged_attention.paged_attention.select(spec) is paged_attention.reference
