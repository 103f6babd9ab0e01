"""Steps replayed from their native calls: the same bits as the step itself, or not replayed at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from make_random_model import make_model

from minivllm.ops import native
from minivllm.ops.linear import PackedLinear
from minivllm.ops.op import OpSpec
from minivllm.ops.recording import recording
from minivllm.ops.rms_norm import cpu as rms_norm
from minivllm.sampling_params import SamplingParams
from minivllm.worker import graphs as worker_graphs
from minivllm.worker.graphs import StepGraphs, key_of
from tests.models.loop import Loop

pytestmark = pytest.mark.skipif(
    native.why_not(OpSpec("cpu", torch.float32)) is not None, reason="only native calls are recorded"
)
WEIGHT = torch.linspace(0.5, 2, 64)


def values(seed: int) -> torch.Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))


def two_norms(x: torch.Tensor) -> torch.Tensor:
    return rms_norm(rms_norm(x, WEIGHT, 1e-6), WEIGHT, 1e-5)


class Step:
    """Two norms, one after the other, of a tensor that is filled anew before every step."""

    def __init__(self) -> None:
        self.x = torch.empty(3, 64)
        self.num_eager = 0

    def __call__(self) -> torch.Tensor:
        self.num_eager += 1
        return two_norms(self.x)

    def run_in(self, graphs: StepGraphs, seed: int) -> torch.Tensor:
        self.x.copy_(values(seed))
        return graphs.run(key_of(self.x), lambda: (self(),))[0]


def test_a_step_met_often_is_replayed_and_gives_the_same_bits():
    step, graphs = Step(), StepGraphs()
    for seed in range(20):
        assert torch.equal(step.run_in(graphs, seed), two_norms(values(seed)))
    assert step.num_eager < 8  # met, recorded, checked; from then on replayed


def test_a_step_without_a_key_is_never_replayed():
    step, graphs = Step(), StepGraphs()
    for _ in range(10):
        graphs.run(None, lambda: (step(),))
    assert step.num_eager == 10


def test_a_step_in_which_torch_computes_is_never_replayed():
    step, graphs = Step(), StepGraphs()

    def with_torch() -> tuple[torch.Tensor]:
        return (step() + 1,)

    for seed in range(10):
        step.x.copy_(values(seed))
        assert torch.equal(graphs.run(key_of(step.x), with_torch)[0], two_norms(values(seed)) + 1)
    assert step.num_eager == 10


def test_a_replay_that_gives_other_bits_is_found_out_before_it_is_trusted():
    step, graphs = Step(), StepGraphs()

    def with_numpy() -> tuple[torch.Tensor]:  # numpy is nobody's to notice
        y = step()
        y.numpy()[0, 0] += step.x.numpy()[0, 0]
        return (y,)

    for seed in range(10):
        expected = two_norms(values(seed))
        step.x.copy_(values(seed))
        expected[0, 0] += step.x[0, 0]
        assert torch.equal(graphs.run(key_of(step.x), with_numpy)[0], expected)
    assert step.num_eager == 10


def test_no_more_memory_is_kept_than_allowed():
    steps, graphs = [Step() for _ in range(6)], StepGraphs(most_bytes=3 * 2 * 3 * 64 * 4)  # of three recordings
    for seed in range(12):
        for step in steps[:3]:
            assert torch.equal(step.run_in(graphs, seed), two_norms(values(seed)))
    kept = steps[0].num_eager
    for seed in range(120):
        for step in steps[3:]:
            assert torch.equal(step.run_in(graphs, seed), two_norms(values(seed)))
    assert all(step.num_eager < 110 for step in steps[3:])
    steps[0].run_in(graphs, 99)
    assert steps[0].num_eager == kept + 1  # given up for those that came later
    big, small = Step(), StepGraphs(most_bytes=64)
    for seed in range(10):
        big.run_in(small, seed)
    assert big.num_eager == 10


def test_of_more_shapes_than_there_is_room_for_some_are_replayed_and_few_recorded(monkeypatch):
    steps, graphs = [Step() for _ in range(8)], StepGraphs(most_bytes=3 * 2 * 3 * 64 * 4, times_met=1)  # of three
    num_recorded = 0

    def counted() -> Any:
        nonlocal num_recorded
        num_recorded += 1
        return recording()

    monkeypatch.setattr(worker_graphs, "recording", counted)
    for seed in range(200):
        for step in steps:
            step.x.copy_(values(seed))
            assert torch.equal(graphs.run(key_of(step.x), lambda step=step: (step(),))[0], two_norms(values(seed)))
    assert sorted(step.num_eager for step in steps)[:4] == [3, 3, 3, 200]
    assert num_recorded < 3 + 5 * 200 / 16


def test_what_an_op_keeps_stays_alive_and_counts_for_no_recording():
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
        Step()()
    assert native.lib.rms_norm is before
    assert taken.tape.names == ["rms_norm", "rms_norm"]


def test_a_native_call_that_is_not_on_the_tape_makes_the_recording_unusable():
    with recording() as taken:
        Step()()
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [{"arch": "qwen3"}, {"arch": "gemma2"}, {"arch": "gemma3"}, {"arch": "llama", "tie_word_embeddings": False}],
    ids=str,
)
def test_a_models_decode_steps_are_replayed_and_give_the_eager_bits(shape: dict, dtype: str, tmp_path: Path):
    model = make_model(tmp_path, **shape, dtype=dtype, num_layers=3, seed=3)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2)
    loop, eager = Loop(model), Loop(model, enforce_eager=True)
    served = loop.worker.runner.model
    num_eager = 0

    def forward(*args: Any) -> torch.Tensor:
        nonlocal num_eager
        num_eager += 1
        return type(served).forward(served, *args)

    served.forward = forward
    assert loop.run([[3, 4, 5]], params) == eager.run([[3, 4, 5]], params)
    assert num_eager < 30  # of 60


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


def test_a_batch_that_meets_block_borders_is_replayed_all_the_same(tmp_path: Path):
    model = make_model(tmp_path, arch="llama", num_layers=2, seed=4)
    prompts = [[3 + i] * (1 + 5 * i) for i in range(12)]  # somebody meets one every few steps
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=100, ignore_eos=True)
    loop, eager = Loop(model, block_size=32), Loop(model, block_size=32, enforce_eager=True)
    served, num_eager = loop.worker.runner.model, 0

    def forward(*args: Any) -> torch.Tensor:
        nonlocal num_eager
        num_eager += 1
        return type(served).forward(served, *args)

    served.forward = forward
    assert loop.run(prompts, params) == eager.run(prompts, params)
    assert num_eager < 40  # of 100


def counted(loop: Loop) -> list[int]:
    """[rows] of each step that the model is called for, from now on."""
    served, seen = loop.worker.runner.model, []

    def forward(ids: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(len(ids))
        return type(served).forward(served, ids, *args)

    served.forward = forward
    return seen


@pytest.mark.parametrize(
    "shape", [{"arch": "qwen3"}, {"arch": "gemma3"}, {"arch": "llama", "tie_word_embeddings": False}], ids=str
)
def test_prompts_of_many_lengths_are_replayed_and_give_the_eager_bits(shape: dict, tmp_path: Path):
    model = make_model(tmp_path, **shape, num_layers=3, dtype="bfloat16", seed=6)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=3, prompt_logprobs=1)
    options = {"enable_prefix_caching": False}
    loop, eager = Loop(model, **options), Loop(model, enforce_eager=True, **options)
    steps = counted(loop)
    for i in range(24):
        prompt = [3 + (i * 7 + j * j) % 50 for j in range(33 + i % 12)]  # of one shape where tiles have 16 rows
        assert loop.run([prompt], params) == eager.run([prompt], params)
    if native.lib.isa() == "amx":
        assert steps == [48] * 3  # met, recorded, checked
    else:
        assert set(steps) == set(range(33, 45))


def test_prompts_beside_decodes_are_replayed_and_give_the_eager_bits(tmp_path: Path):
    model = make_model(tmp_path, arch="qwen3", num_layers=2, dtype="bfloat16", seed=7)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=9, ignore_eos=True, logprobs=2)
    prompts = [[3 + (i * 11 + j) % 60 for j in range(20 + i % 9)] for i in range(40)]
    options = {"max_num_seqs": 8, "enable_prefix_caching": False}
    loop, eager = Loop(model, **options), Loop(model, enforce_eager=True, **options)
    steps, all_steps = counted(loop), counted(eager)
    assert loop.run(prompts, params, stagger=2) == eager.run(prompts, params, stagger=2)
    assert sum(rows > 8 for rows in all_steps) >= 30
    if native.lib.isa() == "amx":
        assert sum(rows > 8 for rows in steps) < 20
