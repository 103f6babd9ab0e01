"""Sampling: the noise by its known answers, the distribution by a chi-square test, truncation against a sort."""

from __future__ import annotations

import itertools

import pytest
import torch

from minivllm.ops import native, sampling
from minivllm.ops.op import OpSpec

INF = float("inf")
needs_kernels = pytest.mark.skipif(
    native.why_not(OpSpec("cpu", torch.float32)) is not None, reason="no kernels"
)


def reference_draw(*batch):
    """The tokens alone."""
    return sampling.gumbel_argmax_reference(*batch)[0]


def native_draw(*batch):
    """The tokens alone."""
    return sampling.gumbel_argmax_cpu(*batch)[0]


both_samplers = pytest.mark.parametrize(
    "sample", [reference_draw, pytest.param(native_draw, marks=needs_kernels)]
)
both_truncations = pytest.mark.parametrize(
    "truncate",
    [sampling.top_k_top_p_min_p_reference, pytest.param(sampling.top_k_top_p_min_p_cpu, marks=needs_kernels)],
)


# The random words ------------------------------------------------------------

KNOWN_ANSWERS = [  # published with the algorithm: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_reference_philox_gives_the_known_answers(counter, key, words):
    got = sampling.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(word.item() for word in got) == words


@needs_kernels
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_native_philox_gives_the_known_answers(isa, counter, key, words):
    assert tuple(native.lib.philox(counter, key)) == words


def test_noise_is_finite_for_every_word():
    extremes = torch.tensor([0, (1 << 32) - 1])
    u = ((extremes >> 9).float() + 0.5) * 2.0**-23
    assert u.tolist() == [2.0**-24, 1 - 2.0**-24]


def test_noise_is_a_function_of_seed_position_and_index_alone():
    seeds, positions = torch.tensor([1, 2, -1]), torch.tensor([5, 6, 1 << 40])
    noise = sampling.gumbel_noise(seeds, positions, 103)
    assert torch.equal(sampling.gumbel_noise(seeds[1:2], positions[1:2], 50), noise[1:2, :50])
    assert noise.unique().numel() > 300  # no row, and no index, repeats another


# Sampling --------------------------------------------------------------------


def batch(num_rows, vocab_size, spread=3.0):
    logits = torch.randn(num_rows, vocab_size) * spread
    temperature = torch.rand(num_rows) + 0.2
    seeds = torch.randint(-(1 << 62), 1 << 62, (num_rows,)) * 2 + 1
    positions = torch.randint(0, 1 << 20, (num_rows,))
    return logits, temperature, seeds, positions


@needs_kernels
@pytest.mark.parametrize("vocab_size", [1, 5, 64, 100, 4096, 4100, 20011])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
def test_the_native_choice_is_the_references_up_to_the_last_bits_of_the_noise(isa, vocab_size, spread):
    logits, temperature, seeds, positions = batch(12, vocab_size, spread)
    got = native_draw(logits, temperature, seeds, positions).unsqueeze(1)
    noise = sampling.gumbel_noise(seeds, positions, vocab_size)
    perturbed = logits / temperature.unsqueeze(1) + noise
    shortfall = perturbed.amax(1, keepdim=True) - perturbed.gather(1, got)
    assert shortfall.max() <= 1e-5 * perturbed.abs().max()


@needs_kernels
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 30.0, 1e4])
def test_no_token_that_could_win_is_passed_over_at_any_temperature(isa, temperature):
    logits, _, seeds, positions = batch(12, 20011)
    degrees = torch.full((12,), temperature)
    perturbed = logits / temperature + sampling.gumbel_noise(seeds, positions, 20011)
    got = native_draw(logits, degrees, seeds, positions)
    shortfall = perturbed.amax(1) - perturbed.gather(1, got.unsqueeze(1))[:, 0]
    assert (shortfall <= 1e-6 * perturbed.abs().amax(1).clamp(min=1)).all()


@needs_kernels
def test_a_choice_does_not_depend_on_threads_or_on_who_is_first(isa, num_threads):
    logits, temperature, seeds, positions = batch(16, 30011, spread=0.0)  # many come close
    expected = [native_draw(*(x[i : i + 1] for x in (logits, temperature, seeds, positions))) for i in range(16)]
    for _ in range(10):
        assert torch.equal(native_draw(logits, temperature, seeds, positions), torch.cat(expected))


@needs_kernels
def test_each_index_gets_its_own_noise_natively(isa):
    seeds, positions = torch.tensor([77]), torch.tensor([12345])
    noise = sampling.gumbel_noise(seeds, positions, 300)[0]
    for rank in range(0, 300, 7):  # with all but two tokens masked, the one with more noise must win
        a, b = rank, (rank * 37 + 11) % 300
        if a == b or abs(noise[a] - noise[b]) < 1e-4:
            continue
        logits = torch.full((1, 300), -INF)
        logits[0, [a, b]] = 0.0
        got = native_draw(logits, torch.ones(1), seeds, positions).item()
        assert got == (a if noise[a] > noise[b] else b)


@both_samplers
def test_samples_follow_the_softmax(sample):
    num_samples, vocab_size, temperature = 20_000, 12, 0.7
    logits = torch.randn(vocab_size)
    logits[3] = -INF
    drawn = sample(
        logits.expand(num_samples, vocab_size),
        torch.full((num_samples,), temperature),
        torch.full((num_samples,), 1234),
        torch.arange(num_samples),
    )
    counts = torch.bincount(drawn, minlength=vocab_size).double()
    expected = (logits.double() / temperature).softmax(0) * num_samples
    assert counts[3] == 0
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 29.6  # 10 degrees of freedom: above this once in 1000 seeds, and the seed is fixed


@both_samplers
def test_seeds_and_positions_give_independent_draws(sample):
    vocab_size, n = 1000, 400
    logits, ones = torch.zeros(n, vocab_size), torch.ones(n)
    by_position = sample(logits, ones, torch.zeros(n, dtype=torch.int64), torch.arange(n))
    by_seed = sample(logits, ones, torch.arange(n), torch.zeros(n, dtype=torch.int64))
    for drawn in (by_position, by_seed):
        assert drawn.unique().numel() > 280  # 330 expected of 400 uniform draws from 1000
    assert (by_position == by_seed).sum() < 10


@both_samplers
@pytest.mark.parametrize("ties", [[3, 5], [4095, 4096], [17, 9000], [0, 9999]])
def test_temperature_zero_is_argmax_with_ties_to_the_lowest_index(sample, ties):
    logits = torch.full((2, 10000), -1.0)
    logits[0, ties] = 3.0
    logits[1] = -INF
    logits[1, 9998] = -1e30
    zeros = torch.zeros(2, dtype=torch.int64)
    assert sample(logits, torch.zeros(2), zeros, zeros).tolist() == [ties[0], 9998]


@both_samplers
@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.0])
def test_a_masked_token_is_never_drawn(sample, temperature):
    n = 300
    logits = torch.full((n, 5000), -INF)
    logits[:, [7, 4999]] = torch.tensor([-50.0, -60.0])
    drawn = sample(logits, torch.full((n,), temperature), torch.arange(n), torch.arange(n))
    assert set(drawn.tolist()) <= {7, 4999}


@needs_kernels
def test_a_token_does_not_depend_on_the_batch_or_the_threads(isa, num_threads):
    logits, temperature, seeds, positions = batch(30, 9001)
    temperature[::7] = 0
    together = native_draw(logits, temperature, seeds, positions)
    order = torch.randperm(30)
    shuffled = native_draw(logits[order], temperature[order], seeds[order], positions[order])
    assert torch.equal(shuffled, together[order])
    for row in range(30):
        alone = [x[row : row + 1] for x in (logits, temperature, seeds, positions)]
        assert native_draw(*alone).item() == together[row]


@needs_kernels
def test_a_row_of_nan_still_gives_an_index_in_range(isa):
    logits = torch.full((3, 5001), float("nan"))
    logits[1, :5000] = -INF
    logits[2] = -INF
    zeros = torch.zeros(3, dtype=torch.int64)
    got = native_draw(logits, torch.ones(3), zeros, zeros)
    assert got.ge(0).all() and got.lt(5001).all()


# Truncation ------------------------------------------------------------------


def truncated(truncate, logits, top_k=0, top_p=1.0, min_p=0.0):
    logits = logits.clone()
    n = len(logits)
    truncate(
        logits,
        torch.as_tensor(top_k, dtype=torch.int32).expand(n).contiguous(),
        torch.as_tensor(top_p, dtype=torch.float32).expand(n).contiguous(),
        torch.as_tensor(min_p, dtype=torch.float32).expand(n).contiguous(),
    )
    return logits


def survivors(truncate, row, **options):
    (kept,) = truncated(truncate, torch.tensor([row]), **options)
    assert all(value in (-INF, before) for value, before in zip(kept.tolist(), torch.tensor(row).tolist()))
    return kept.gt(-INF).nonzero().flatten().tolist()


LOG_PROBS = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().tolist()


@both_truncations
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(), [0, 1, 2, 3, 4]),
        (dict(top_k=1), [1]),
        (dict(top_k=3), [1, 3, 4]),
        (dict(top_k=5), [0, 1, 2, 3, 4]),
        (dict(top_k=100), [0, 1, 2, 3, 4]),
        (dict(top_p=1e-6), [1]),
        (dict(top_p=0.39), [1]),
        (dict(top_p=0.41), [1, 3]),
        (dict(top_p=0.86), [0, 1, 3, 4]),
        (dict(min_p=1.0), [1]),
        (dict(min_p=0.3), [1, 3, 4]),
        (dict(top_k=2, top_p=0.56), [1]),  # of the two that are left, 0.4 is 57 %
        (dict(top_k=2, top_p=0.58), [1, 3]),
        (dict(min_p=0.3, top_k=4, top_p=0.8), [1, 3]),
    ],
)
def test_each_truncation_keeps_what_it_says(truncate, options, kept):
    assert survivors(truncate, LOG_PROBS, **options) == kept


@both_truncations
def test_top_k_keeps_every_tie_with_the_kth(truncate):
    assert survivors(truncate, [1.0, 3.0, 2.0, 2.0, 2.0, 0.0], top_k=2) == [1, 2, 3, 4]


@both_truncations
def test_top_p_breaks_ties_by_the_lowest_index(truncate):
    assert survivors(truncate, [0.0] * 8, top_p=0.5) == [0, 1, 2, 3]
    assert survivors(truncate, [0.0] * 8, top_p=0.51) == [0, 1, 2, 3, 4]
    assert survivors(truncate, [0.0, 5.0, 0.0, 5.0, 0.0], top_p=0.4) == [1]


@both_truncations
def test_masked_tokens_stay_masked_and_do_not_count(truncate):
    row = [-INF, 1.0, -INF, 1.0, -INF, 0.0]
    assert survivors(truncate, row, top_p=0.999) == [1, 3, 5]
    assert survivors(truncate, row, top_k=5) == [1, 3, 5]
    assert survivors(truncate, row, top_k=2) == [1, 3]


@both_truncations
def test_a_row_without_a_finite_maximum_stays_as_it_is(truncate, assert_same_bits):
    logits = torch.randn(4, 100)
    logits[0], logits[1, 5], logits[2, 6] = -INF, float("nan"), INF
    got = truncated(truncate, logits, top_k=3, top_p=0.5, min_p=0.1)
    assert_same_bits(got[:3], logits[:3])
    assert got[3].gt(-INF).sum() <= 3


def logits_of(kind, shape):
    if kind == "flat":
        return torch.rand(shape) * 0.01
    if kind == "coarse":  # many exact ties
        return torch.randn(shape).mul(2).round()
    if kind == "sorted":
        return torch.randn(shape).sort(dim=1, descending=True).values
    if kind == "mostly masked":
        return torch.randn(shape).masked_fill(torch.rand(shape) < 0.9, -INF)
    return torch.randn(shape) * 5


@needs_kernels
@pytest.mark.parametrize("kind", ["peaked", "flat", "coarse", "sorted", "mostly masked"])
@pytest.mark.parametrize("vocab_size", [1, 3, 17, 100, 5000, 9001])
def test_selection_keeps_exactly_what_the_sort_keeps(isa, kind, vocab_size):
    top_k = [0, 1, 5, 50, vocab_size // 2, vocab_size - 1]
    settings = list(itertools.product(top_k, [1.0, 0.03, 0.5, 0.937], [0.0, 0.0021]))
    logits = logits_of(kind, (len(settings), vocab_size))
    logits[:, 0] = 1.5  # so that no row is masked throughout
    options = dict(zip(("top_k", "top_p", "min_p"), map(torch.tensor, zip(*settings))))
    expected = truncated(sampling.top_k_top_p_min_p_reference, logits, **options)
    got = truncated(sampling.top_k_top_p_min_p_cpu, logits, **options)
    wrong = (got != expected).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, [settings[i] for i in wrong]


@needs_kernels
def test_rows_are_truncated_independently(isa, num_threads, assert_same_bits):
    logits = torch.randn(20, 7001) * 4
    options = dict(
        top_k=torch.randint(0, 60, (20,)), top_p=torch.rand(20).clamp(min=0.05), min_p=torch.rand(20) * 0.05
    )
    together = truncated(sampling.top_k_top_p_min_p_cpu, logits, **options)
    for row in range(20):
        alone = truncated(
            sampling.top_k_top_p_min_p_cpu, logits[row : row + 1], **{k: v[row] for k, v in options.items()}
        )
        assert_same_bits(alone, together[row : row + 1])


@needs_kernels
def test_truncation_writes_only_its_own_rows_of_a_wider_matrix():
    wide = torch.randn(3, 200)
    part, before = wide[:, 10:111], wide.clone()
    options = (torch.full((3,), 4, dtype=torch.int32), torch.full((3,), 0.9), torch.zeros(3))
    expected = part.clone()
    sampling.top_k_top_p_min_p_reference(expected, *options)
    sampling.top_k_top_p_min_p_cpu(part, *options)
    assert torch.equal(part, expected)
    assert torch.equal(wide[:, :10], before[:, :10]) and torch.equal(wide[:, 111:], before[:, 111:])


# Validity --------------------------------------------------------------------


@pytest.mark.parametrize(
    "find",
    [sampling.nonfinite_rows_reference, pytest.param(sampling.nonfinite_rows_cpu, marks=needs_kernels)],
)
@pytest.mark.parametrize("vocab_size", [1, 20, 9001])
def test_rows_that_nothing_can_be_drawn_from_are_named(find, vocab_size):
    logits = torch.randn(6, vocab_size)
    last = vocab_size - 1
    logits[1, last], logits[2, last], logits[3] = float("nan"), INF, -INF
    logits[4, :last] = -INF  # one token left: fine
    assert find(logits) == [1, 2, 3]
    assert find(logits[4:]) == []


@pytest.mark.parametrize(
    "choose", [sampling.gumbel_argmax_reference, pytest.param(sampling.gumbel_argmax_cpu, marks=needs_kernels)]
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("vocab_size", [1, 20, 4096, 9001])
def test_choosing_a_token_names_the_same_rows(choose, temperature, vocab_size):
    logits = torch.randn(7, vocab_size)
    last = vocab_size - 1
    logits[1, last], logits[2, 0], logits[3], logits[5, last] = float("nan"), float("nan"), -INF, INF
    logits[4, :last] = -INF
    zeros = torch.zeros(7, dtype=torch.int64)
    _, broken = choose(logits, torch.full((7,), temperature), zeros, zeros)
    assert broken.tolist() == [0, 1, 1, 1, 0, 1, 0]


@needs_kernels
def test_arguments_of_the_wrong_dtype_are_refused():
    logits, temperature, seeds, positions = batch(2, 10)
    with pytest.raises(ValueError, match="seeds is .*int32.*must be .*int64"):
        native_draw(logits, temperature, seeds.int(), positions)
    with pytest.raises(ValueError, match="top_k is .*int64.*must be .*int32"):
        sampling.top_k_top_p_min_p_cpu(logits, seeds, temperature, temperature)


@needs_kernels
def test_the_kernels_are_preferred_on_a_cpu():
    spec = OpSpec("cpu", torch.float32)
    assert sampling.gumbel_argmax.select(spec) is sampling.gumbel_argmax_cpu
    assert sampling.top_k_top_p_min_p.select(spec) is sampling.top_k_top_p_min_p_cpu
    assert sampling.nonfinite_rows.select(spec) is sampling.nonfinite_rows_cpu
