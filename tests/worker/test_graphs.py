"""Steps replayed from their native calls: the same bits as the step itself, or not replayed at all."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from make_random_model import make_model

from minivllm.ops import native
from minivllm.ops.linear import PackedLinear
from minivllm.ops.op import OpSpec
from minivllm.ops.recording import SizedRecording, record_for_sizes, recording
from minivllm.ops.rms_norm import cpu as rms_norm
from minivllm.sampling_params import SamplingParams
from minivllm.worker.graphs import RecordedStep, key_of
from minivllm.worker.input_batch import InputBatch
from minivllm.worker.model_runner import ModelRunner
from tests.models.loop import Answer, Loop

pytestmark = pytest.mark.skipif(
    native.why_not(OpSpec("cpu", torch.float32)) is not None, reason="only native calls are recorded"
)
WEIGHT = torch.linspace(0.5, 2, 64)
MOST = 40  # rows of a step


def values(seed: int, num_rows: int = 3) -> torch.Tensor:
    return torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(seed))


def two_norms(x: torch.Tensor) -> torch.Tensor:
    return rms_norm(rms_norm(x, WEIGHT, 1e-6), WEIGHT, 1e-5)


class Steps:
    """Two norms, one after the other, of the first rows of a tensor that are filled anew before every step."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor] = two_norms) -> None:
        self.x, self._compute = torch.zeros(MOST, 64), compute
        self.num_eager = 0
        self.recorded = RecordedStep("a test", lambda sizes: (compute(self.x[: sizes[0]]),), (MOST,))

    def run(self, seed: int, num_rows: int) -> torch.Tensor:
        self.x[:num_rows] = values(seed, num_rows)
        return self.recorded.run((num_rows,), lambda: self._eager(num_rows))[0]

    def _eager(self, num_rows: int) -> tuple[torch.Tensor]:
        self.num_eager += 1
        return (self._compute(self.x[:num_rows]),)


def test_steps_of_any_number_of_rows_are_replayed_from_one_recording_and_give_the_same_bits():
    steps = Steps()
    for seed in range(MOST):
        for num_rows in (1 + seed, MOST - seed):
            found = steps.run(seed, num_rows)
            assert torch.equal(found, two_norms(values(seed, num_rows)))
    assert steps.num_eager == 1  # the first was checked


def test_a_step_in_which_torch_computes_is_never_replayed():
    steps = Steps(lambda x: two_norms(x) + 1)
    assert steps.recorded.recording is None
    for seed in range(10):
        assert torch.equal(steps.run(seed, 1 + seed), two_norms(values(seed, 1 + seed)) + 1)
    assert steps.num_eager == 10


def test_a_replay_that_gives_other_bits_is_found_out_before_it_is_trusted():
    def with_numpy(x: torch.Tensor) -> torch.Tensor:  # numpy is nobody's to notice
        y = two_norms(x)
        y.numpy()[0, 0] += x.numpy()[0, 0]
        return y

    steps = Steps(with_numpy)
    for seed in range(10):
        expected = two_norms(values(seed))
        expected[0, 0] += values(seed)[0, 0]
        assert torch.equal(steps.run(seed, 3), expected)
    assert steps.num_eager == 10


def test_a_wrong_number_of_rows_is_found_out_before_it_is_trusted():
    steps = Steps()
    steps.x[:] = values(0, MOST)
    outputs = steps.recorded.run((5,), lambda: (two_norms(steps.x[:7]),))
    assert torch.equal(outputs[0], two_norms(values(0, MOST)[:7])) and steps.recorded.recording is None


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (lambda x: two_norms(x if len(x) > 9 else x[:, :]) if len(x) > 20 else rms_norm(x, WEIGHT, 1e-6), "calls at"),
        (lambda x: rms_norm(x if len(x) == 1 else x[1:], WEIGHT, 1e-6), "more than integers"),
        (lambda x: rms_norm(x if len(x) == 1 else x[:-1], WEIGHT, 1e-6), "no multiple"),
        (lambda x: rms_norm(x, WEIGHT, 1e-6 if len(x) > 9 else 1e-5), "more than integers"),
        (lambda x: rms_norm(x if len(x) > 9 else torch.empty(9, 64)[: len(x)], WEIGHT, 1e-6), "not at the largest"),
    ],
)
def test_a_step_that_differs_in_more_than_numbers_of_rows_is_not_recorded(step: Callable[..., Any], why: str):
    x = torch.zeros(MOST, 64)

    def sized(sizes: tuple[int, ...]) -> tuple[torch.Tensor]:
        return (step(x[: sizes[0]]),)

    assert why in record_for_sizes(sized, (MOST,))


def test_sizes_are_told_apart_and_multiplied():
    """Rows of x are 4 a token; those of y one a request."""
    x, y = torch.zeros(4 * MOST, 64), torch.zeros(MOST, 64)

    def step(sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        tokens, requests = sizes
        return rms_norm(x[: 4 * tokens].view(tokens, 4, 64), WEIGHT, 1e-6), rms_norm(y[:requests], WEIGHT, 1e-6)

    taken = record_for_sizes(step, (MOST, MOST))
    for tokens, requests in [(3, 2), (2, 3), (MOST, 1), (1, MOST), (7, 7)]:
        x.copy_(values(tokens, len(x))), y.copy_(values(requests, len(y)))
        for output in taken.outputs:
            output.fill_(77)
        ours, its = taken.replay((tokens, requests)), step((tokens, requests))
        assert all(map(torch.equal, ours, its))
        assert all((output[len(own) :] == 77).all() for output, own in zip(taken.outputs, ours))  # and no row more


@pytest.mark.parametrize(
    ("rows", "found"),
    [(max, "40 at one size, 1 at another, 11 at"), (lambda a, b: a if a in (1, MOST) else 3, "1 at another, 3 at")],
)
def test_a_number_of_rows_that_is_a_size_only_by_chance_is_not_recorded(rows: Callable[..., int], found: str):
    x = torch.zeros(MOST, 64)

    def step(sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        two_norms(x[: rows(*sizes)])
        return tuple(two_norms(x[:size]) for size in sizes)

    assert found in record_for_sizes(step, (MOST, MOST // 2))


def test_sizes_that_could_be_taken_for_each_other_are_refused():
    assert "cannot be told apart" in record_for_sizes(lambda sizes: (), (2, 2, 2))


def test_a_step_that_looks_at_what_was_not_computed_is_not_recorded():
    table = torch.zeros(4, 64)
    assert "out of bounds" in record_for_sizes(lambda sizes: (table[torch.tensor([99])],), (MOST,))


def test_what_another_thread_calls_beside_a_recording_is_made_and_not_on_it():
    x, out = values(1, 8), []
    with recording(is_dry=True) as taken, ThreadPoolExecutor(1) as other:
        other.submit(lambda: out.append(rms_norm(x, WEIGHT, 1e-6))).result()
    assert len(taken.tape) == 0 and taken.unusable is None
    assert torch.equal(out[0], rms_norm(x, WEIGHT, 1e-6))


def test_a_recording_makes_no_call():
    x = torch.zeros(MOST, 64)
    ids, linear = torch.tensor([99]), PackedLinear(4, 64, torch.float32)
    with recording(is_dry=True) as taken:
        linear.rows(ids)  # would raise
        y = rms_norm(x, WEIGHT, 1e-6)
        y_before = y.numpy().tobytes()  # anything, a NaN included
    assert taken.tape.names == ["gather_rows", "rms_norm"] and y.numpy().tobytes() == y_before


def test_a_tape_is_replayed_with_as_many_sizes_as_it_has_and_none_above_the_most():
    taken = Steps().recorded.recording
    with pytest.raises(ValueError, match="2 sizes for a tape of 1"):
        taken.recording.replay((1, 1))
    with pytest.raises(ValueError, match=f"{MOST + 1},.*{MOST},.* at most"):
        taken.replay((MOST + 1,))


def test_memory_that_a_recording_is_shown_stays_alive_and_counts_for_no_recording():
    scratch, x = torch.empty(1000, 64), values(1)
    with recording() as taken:
        place = scratch[:3]
        y = rms_norm(x, WEIGHT, 1e-6)
    assert taken.nbytes == y.nbytes
    where = place.untyped_storage()
    del scratch, place
    assert where.data_ptr() in taken._kept and where.nbytes() == 1000 * 64 * 4


def test_a_recording_keeps_no_more_than_lives_at_once():
    def norms(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = rms_norm(x, WEIGHT, 1e-6)[:, :]  # a view, which outlives what it is of
        return x

    x = values(1)
    with recording() as taken:
        first = norms(x)
        second = norms(first)
    assert taken.nbytes == 3 * first.nbytes  # the first result, and two that take turns
    x.copy_(values(2))
    taken.replay()
    assert torch.equal(first, norms(values(2))) and torch.equal(second, norms(first))


def test_a_key_is_where_tensors_lie_and_in_what_shape():
    x = torch.zeros(4, 6)
    assert key_of(x) == key_of(x)
    assert key_of(x) != key_of(x.clone())
    assert key_of(x) != key_of(x[:3]) and key_of(x) != key_of(x.t())
    assert key_of(x, 3) != key_of(x, 4)
    assert key_of([x, x]) != key_of([x], x)
    assert key_of(x, object()) is None


def test_functions_are_as_they_were_after_a_recording():
    before = native.lib.rms_norm
    with pytest.raises(ZeroDivisionError), recording():
        raise ZeroDivisionError
    with recording() as taken:
        two_norms(values(1))
    assert native.lib.rms_norm is before
    assert taken.tape.names == ["rms_norm", "rms_norm"]


def test_a_native_call_that_is_not_on_the_tape_makes_the_recording_unusable():
    with recording() as taken:
        two_norms(values(1))
        native.lib.philox([0, 0, 0, 0], [0, 0])
    assert "philox cannot be recorded" in taken.unusable


def test_a_tape_makes_its_calls_again_with_the_arguments_they_had():
    x = values(1)
    with recording() as taken:
        y = two_norms(x)
    first = y.clone()
    y.zero_()
    taken.replay()
    assert torch.equal(y, first)
    x.copy_(values(2))
    assert len(taken.tape.timed_replay()) == 2
    assert torch.equal(y, two_norms(values(2)))


def test_an_error_of_a_replayed_call_is_raised_and_what_follows_is_not_done():
    ids, linear = torch.tensor([1, 2]), PackedLinear(4, 64, torch.float32)
    linear.load_rows(0, torch.ones(4, 64))
    with recording() as taken:
        rows = linear.rows(ids)
        y = two_norms(rows)
    y.zero_()
    ids[1] = 99
    with pytest.raises(IndexError, match="row 99"):
        taken.replay()
    assert not y.any()


def test_recording_brings_in_no_compiler():
    """Torch's takes more than a second to import, and would do so in the middle of somebody's answer."""
    code = (
        "import sys, torch\n"
        "from minivllm.ops.recording import recording\n"
        "with recording() as taken: torch.ones(2) + 1\n"
        "assert taken.unusable, 'nothing was watched'\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def counted(loop: Loop) -> list[int]:
    """[rows] of each step that the model is called for, from now on."""
    served, seen = loop.worker.runner.model, []

    def forward(ids: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(len(ids))
        return type(served).forward(served, ids, *args)

    served.forward = forward
    return seen


SAMPLED = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0.8, "logprobs": 1},
    {"temperature": 0.8, "top_k": 9},
]


def walk(loop: Loop, seed: int) -> list[Answer]:
    """Requests of all lengths and kinds, alone and many at once; some begin alike, so that they share blocks."""
    pick, answers = random.Random(seed), []
    common = [3 + pick.randrange(60) for _ in range(300)]
    for _ in range(4):
        prompts, params = [], []
        for _ in range(pick.choice([1, 2, 9])):
            shared = pick.choice([0, 0, 0, 130, 260])
            prompts.append(common[:shared] + [3 + pick.randrange(60) for _ in range(pick.choice([1, 2, 15, 16, 90]))])
            params.append(SamplingParams(**pick.choice(SAMPLED), max_tokens=pick.choice([1, 2, 40]), ignore_eos=True))
        if pick.random() < 0.5:
            params = [params[0]] * len(prompts)
        answers += loop.run(prompts, params, stagger=pick.choice([0, 1]))
    return answers


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"arch": "llama", "dtype": "bfloat16"}, {}),
        ({"arch": "llama", "dtype": "bfloat16"}, {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 40}),
        ({"arch": "llama", "tie_word_embeddings": False}, {"kv_cache_dtype": "fp8"}),
        ({"arch": "qwen3", "dtype": "bfloat16"}, {"kv_cache_dtype": "int8"}),
        ({"arch": "qwen3", "dtype": "bfloat16"}, {"quantization": "int8"}),
        ({"arch": "qwen2", "dtype": "float32"}, {"max_num_seqs": 1}),
        ({"arch": "gemma2", "dtype": "bfloat16"}, {}),
        ({"arch": "gemma3", "dtype": "float32"}, {}),
    ],
    ids=str,
)
def test_a_models_steps_are_replayed_whatever_their_sizes_and_give_the_eager_bits(
    shape: dict, options: dict, tmp_path: Path
):
    model = make_model(tmp_path, **shape, num_layers=3, seed=3)
    loop, eager = Loop(model, **options), Loop(model, enforce_eager=True, **options)
    ours, all_steps = counted(loop), counted(eager)
    for seed in range(3):
        assert walk(loop, seed) == walk(eager, seed)
    assert len(ours) <= 3 and len(set(all_steps)) > 8  # one of each kind of decode was checked


def test_shared_prefixes_of_decodes_beside_prompts_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_model(tmp_path, arch="qwen3", num_layers=2, dtype="bfloat16", seed=7)
    common = [3 + i * i % 60 for i in range(256)]
    prompts = [common + [3 + i] * (1 + i) for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    loop, eager = Loop(model), Loop(model, enforce_eager=True)
    seen: set[tuple[int, ...]] = set()
    replay = SizedRecording.replay
    monkeypatch.setattr(SizedRecording, "replay", lambda self, sizes: seen.add(sizes) or replay(self, sizes))
    assert loop.run(prompts, params, stagger=3) == eager.run(prompts, params, stagger=3)
    assert {groups for *_, groups, _ in seen} == {0, 1} and {members for *_, members in seen} >= {2, 3, 4, 5, 6}


def test_a_model_that_is_replayed_with_wrong_rows_is_found_out_before_the_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(tmp_path, arch="llama", num_layers=2, seed=4)
    sizes_of = ModelRunner._sizes

    def wrong(self: ModelRunner, *args: Any) -> tuple[int, ...]:
        tokens, *others = sizes_of(self, *args)
        return tokens - 1, *others  # attention would read rows that there are not

    monkeypatch.setattr(ModelRunner, "_sizes", wrong)
    loop = Loop(model)
    assert not loop.worker.runner.is_recorded
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    assert loop.run([[3, 4, 5]], params) == Loop(model, enforce_eager=True).run([[3, 4, 5]], params)


def test_a_decode_that_is_replayed_wrongly_is_found_out_when_it_is_first_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The check before the first request sees nothing of the cache; this one does."""
    model = make_model(tmp_path, arch="llama", num_layers=2, seed=4)
    loop, eager = Loop(model), Loop(model, enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    sizes_of = ModelRunner._sizes

    def wrong(self: ModelRunner, batch: InputBatch, metadata: list[Any]) -> tuple[int, ...]:
        tokens, reqs, *others = sizes_of(self, batch, metadata)
        return tokens, reqs - batch.is_decode, *others

    monkeypatch.setattr(ModelRunner, "_sizes", wrong)
    prompts = [[3, 4, 5], [6, 7], [8]]
    assert loop.run(prompts, params) == eager.run(prompts, params)
    assert loop.worker.runner.is_recorded
    assert [each.recording for each in loop.worker.runner._recorded_decodes.values()] == [None]


def test_choosing_a_prompts_token_is_replayed_once_a_decode_has_shown_that_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(tmp_path, arch="llama", num_layers=2, seed=4)
    loop, eager = Loop(model), Loop(model, enforce_eager=True)
    replayed: list[bool] = []
    run_decode = ModelRunner._run_decode
    monkeypatch.setattr(
        ModelRunner,
        "_run_decode",
        lambda self, batch: run_decode(self, batch) or replayed.append(batch.is_decode),
    )
    for temperature in (0, 0.8):
        params = SamplingParams(temperature=temperature, max_tokens=3, ignore_eos=True)
        for prompts, num_prompt_steps in (([[3, 4, 5]], 0), ([[6, 7], [8, 9, 10]], 1), ([[3] * 70], 1)):
            replayed.clear()
            assert loop.run(prompts, params) == eager.run(prompts, params)
            assert replayed.count(False) == num_prompt_steps and replayed.count(True) == 2
    for step in loop.worker.runner._recorded_decodes.values():
        step._is_trusted = False  # as if no decode had given the eager bits yet
    replayed.clear()
    assert loop.run([[4, 5]], SamplingParams(max_tokens=1)) == eager.run([[4, 5]], SamplingParams(max_tokens=1))
    assert not replayed


def test_a_recording_keeps_memory_for_the_largest_step_once(tmp_path: Path):
    model = make_model(tmp_path, arch="llama", num_layers=4, seed=4)
    few, many = (Loop(model, max_num_batched_tokens=tokens).worker.runner for tokens in (256, 512))
    kept = many._recorded.recording.nbytes
    assert kept == 2 * few._recorded.recording.nbytes
    hf = many.model.layers[0].mlp.gate_up_proj
    assert kept <= 512 * 4 * (4 * hf.in_features + 3 * hf.packed.out_features)  # about a layer's, whatever their number
