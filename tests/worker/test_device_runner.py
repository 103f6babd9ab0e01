"""The runner as it serves a GPU, on a device that is none (fake_device.py): the answers are the CPU's, to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from make_random_model import make_model
from safetensors.torch import load_file, save_file

from minivllm import LLM
from minivllm.attention import registry
from minivllm.config.compilation import CaptureOptions
from minivllm.config.profiler import ProfilerConfig
from minivllm.exceptions import ConfigError, EngineError, ModelFilesError
from minivllm.logits_processors import BatchUpdate, LogitsProcessor
from minivllm.messages.engine import EngineCoreRequest
from minivllm.messages.worker import GrammarOutput
from minivllm.models.decoder import DecoderForCausalLM
from minivllm.models.loader import PinnedStream
from minivllm.ops.op import Op
from minivllm.sampling_params import SamplingParams, ThinkingTokens
from minivllm.worker import warm_up
from minivllm.worker.block_table import BlockTable
from minivllm.worker.buffers import Mirror, Staging
from minivllm.worker.capture_shapes import CaptureShapes, default_size
from minivllm.worker.device_sampling import DeviceSampling
from minivllm.worker.graphs import CapturedGraphs
from minivllm.worker.model_runner import ModelRunner
from minivllm.worker.profiler import WorkerProfiler
from minivllm.worker.step_block_table import DeviceBlockTable
from tests.models.loop import Loop
from tests.worker.fake_device import ON_LOGITS, FakeDevice, FakeGraphs, on_device, recording_ops, strict_ops

PROMPTS = [[(i * 31 + length) % 490 for i in range(length)] for length in (60, 3, 62, 33, 1, 90, 17, 5, 40, 9)]
MIXED = [
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.9, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, max_tokens=25, ignore_eos=True),
    SamplingParams(
        temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.2, max_tokens=25, ignore_eos=True
    ),
    SamplingParams(temperature=0, logprobs=3, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.1, min_p=0.05, logit_bias={7: 3.0}, max_tokens=18, ignore_eos=True),
    SamplingParams(temperature=0, prompt_logprobs=2, max_tokens=5, ignore_eos=True),
    SamplingParams(  # few tokens, so that the words come up
        temperature=1.5, allowed_token_ids=[3, 4, 5, 6, 7], bad_words_token_ids=[[3, 4], [5, 6, 7], [7, 7]],
        logprob_token_ids=[3, 100], max_tokens=24, ignore_eos=True,
    ),
    SamplingParams(
        thinking_token_budget=4, thinking=ThinkingTokens([10], [11, 12], is_open=True), presence_penalty=1.0,
        max_tokens=14, ignore_eos=True,
    ),
    SamplingParams(
        temperature=1.2, allowed_token_ids=[3, 4], stop_token_ids=[3], min_tokens=9, max_tokens=20, logprobs=1
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", ["tests.worker.fake_device:FakeDeviceBackend"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("device"), arch="qwen3", dtype="float32", seed=3)


@pytest.fixture(scope="module")
def expected(model: Path):
    return Loop(model, enforce_eager=True).run(PROMPTS, MIXED)


def test_its_answers_are_the_cpus_whatever_each_request_asks_for(model: Path, expected):
    platform = FakeDevice()
    loop = Loop(model, platform=platform)
    assert loop.run(PROMPTS, MIXED) == expected
    assert platform.graphs.num_replays > 10


@pytest.mark.parametrize(
    "options", [{"enforce_eager": True}, {"max_num_batched_tokens": 32}, {"max_num_seqs": 2}]
)
def test_neither_graphs_nor_chunks_nor_batches_change_an_answer(model: Path, expected, options):
    loop = Loop(model, platform=FakeDevice(), **options)
    assert loop.run(PROMPTS, MIXED, stagger=2) == expected


def test_two_plans_in_flight_give_the_same_answers_though_the_host_sees_tokens_late(model: Path, expected):
    loop = Loop(model, platform=FakeDevice(), plans_in_flight=2)
    assert loop.run(PROMPTS, MIXED) == expected


def test_a_recording_ends_after_its_steps_though_nobody_waits_for_their_tokens(model: Path, tmp_path: Path):
    loop = Loop(model, platform=FakeDevice(), plans_in_flight=2)
    config = ProfilerConfig(torch_profiler_dir=str(tmp_path), torch_profiler_with_stack=False, max_iterations=2)
    loop.worker._profiler = WorkerProfiler(config)
    assert loop.worker.start_profile("", None, None)
    loop.run(PROMPTS[:1], MIXED[0])
    files = sorted(map(str, tmp_path.iterdir()))
    assert len(files) == 2 and sorted(loop.worker.stop_profile()) == files


def test_tokens_that_only_the_device_knows_survive_preemption(model: Path, expected):
    loop = Loop(model, platform=FakeDevice(), plans_in_flight=2, num_gpu_blocks_override=8, max_model_len=128)
    assert loop.run(PROMPTS, MIXED) == expected
    assert loop.num_preemptions > 0


def test_the_host_reads_nothing_of_a_step_before_its_event_whatever_each_request_asks_for(
    model: Path, expected, monkeypatch: pytest.MonkeyPatch
):
    """Logits cannot be read where they are, nor what is computed from them; copies give garbage until then."""
    compute = DecoderForCausalLM.compute_logits
    monkeypatch.setattr(DecoderForCausalLM, "compute_logits", lambda self, hidden: on_device(compute(self, hidden)))
    monkeypatch.setattr(Op, "select", strict_ops(Op.select))
    make = DeviceSampling.__init__

    def and_hide(self: DeviceSampling, *args) -> None:
        make(self, *args)
        self._last = on_device(self._last)

    monkeypatch.setattr(DeviceSampling, "__init__", and_hide)
    for options in ({}, {"num_gpu_blocks_override": 8, "max_model_len": 128, "enforce_eager": True}):
        loop = Loop(model, platform=FakeDevice(), plans_in_flight=2, **options)
        assert loop.run(PROMPTS, MIXED) == expected


def test_a_grammar_that_begins_behind_a_free_token_masks_what_comes_next(model: Path):
    loop = Loop(model, platform=FakeDevice(), plans_in_flight=2)
    worker, scheduler, prompts = loop.worker, loop.scheduler, [PROMPTS[1], PROMPTS[4]]
    for request_id, prompt in zip("ab", prompts):
        scheduler.add_request(EngineCoreRequest(request_id, prompt, MIXED[0], seed=0))
    words = np.zeros(-(-loop.config.hf_config.vocab_size // 32), np.uint32)
    words[123 // 32] = 1 << 123 % 32
    handles = []
    for grammar in (None, GrammarOutput(["a"], words.tobytes())):
        worker.execute_model(scheduler.schedule())
        handles.append(worker.start_sampling(grammar))
    (first, free), (second, its) = (handle.result().sampled_token_ids for handle in handles)
    calm, other = (answer.tokens for answer in Loop(model).run(prompts, MIXED[0]))
    assert first == calm[:1] and second == [123] and calm[1] != 123
    assert free + its == other[:2]


class LastTokensSeen(LogitsProcessor):
    """An operator's own code, which may look at every token so far."""

    seen: ClassVar[list[list[int]]] = []

    def __init__(self, config, device: torch.device, is_pin_memory: bool) -> None:
        self.outputs: list[list[int]] = []

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is not None:
            self.outputs = [output for _, _, _, output in batch_update.added]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        self.seen.append(list(self.outputs[0]))
        return logits


def test_an_operators_code_runs_on_the_host_and_sees_every_token(model: Path):
    name = f"{__name__}:LastTokensSeen"
    loop = Loop(model, platform=FakeDevice(), plans_in_flight=2, logits_processors=(name,))
    answer = loop.run(PROMPTS[:1], MIXED[1])[0]
    assert answer == Loop(model).run(PROMPTS[:1], MIXED[1])[0]
    assert LastTokensSeen.seen == [answer.tokens[:i] for i in range(len(answer.tokens))]


def test_decodes_are_padded_to_few_sizes_and_each_is_captured_once(model: Path):
    platform = FakeDevice()
    greedy = [SamplingParams(temperature=0, max_tokens=4 + 3 * i, ignore_eos=True) for i in range(11)]
    Loop(model, platform=platform, max_model_len=512).run([[i + 1, 5, 9] for i in range(11)], greedy)
    captured = platform.graphs.num_rows[4:]  # behind two shapes that were measured
    assert captured[:2] == [16, 16] and sorted(captured[1:]) == sorted(set(captured))
    assert set(captured) <= {1, 2, 4, 8, 16}


def test_sizes_waste_at_most_an_eighth_where_it_matters():
    assert [default_size(n) for n in (1, 2, 3, 4, 5, 8, 9, 64)] == [1, 2, 4, 4, 8, 8, 16, 64]
    assert all(n <= default_size(n) <= max(n + 7, n * 9 / 8) for n in range(5, 5000))
    assert len({default_size(n) for n in range(1, 513)}) < 40
    assert len({default_size(n) for n in range(513, 4097)}) == 24  # so that no server captures one for each number


def test_shapes_are_those_that_are_asked_for_as_far_as_there_is_a_use_for_them():
    plain = CaptureShapes(CaptureOptions(), 5, 500)
    assert list(plain) == [(8, 500), (4, 500), (2, 500), (1, 500)]
    assert CaptureShapes(CaptureOptions(), 2000, 500).sizes[-1] == 512
    assert CaptureShapes(CaptureOptions(largest=20), 2000, 500).sizes == (1, 2, 4, 8, 16, 20)
    given = CaptureShapes(CaptureOptions(sizes=(2, 6, 12, 400)), 10, 40_000)
    assert (given.sizes, given.lengths) == ((2, 6, 12), (1024, 40_000))
    assert [given.padded(n) for n in (1, 2, 3, 7, 12)] == [2, 2, 6, 12, 12]
    assert [given.bound(n) for n in (1, 1024, 1025, 40_000)] == [1024, 1024, 40_000, 40_000]
    assert not given.has(13) and given.padded(13) == 13


def test_a_decode_of_more_requests_than_are_captured_runs_without_a_graph(model: Path, expected):
    platform = FakeDevice()
    loop = Loop(model, platform=platform, cudagraph_capture_sizes=[1, 3])
    assert set(platform.graphs.num_rows) == {1, 3}  # measured
    platform.graphs.num_rows.clear()
    assert loop.run(PROMPTS, MIXED) == expected
    assert set(platform.graphs.num_rows) <= {1, 3}


@pytest.mark.parametrize(
    "options", [{"enforce_eager": True}, {"compilation_config": {"cudagraph_mode": "NONE"}}], ids=str
)
def test_nothing_is_captured_where_nothing_shall_be(model: Path, expected, options):
    platform = FakeDevice()
    assert Loop(model, platform=platform, **options).run(PROMPTS[:2], MIXED[:2]) == expected[:2]
    assert not platform.graphs.num_rows


def test_all_shapes_are_captured_before_the_first_request_if_that_is_asked_for(model: Path, expected, capfd):
    platform = FakeDevice()
    options = {"max_num_seqs": 8, "max_model_len": 1200, "use_tqdm_on_load": True}
    loop = Loop(model, platform=platform, cudagraph_capture_at_start=True, **options)
    at_start = platform.graphs.num_rows[4:]  # behind two shapes that were measured
    assert at_start == [size for size in (8, 4, 2, 1) for length in (1024, 1200) for truncates in (False, True)]
    assert "Capturing decode steps: 100%" in capfd.readouterr().err
    assert loop.run(PROMPTS, MIXED) == expected
    assert platform.graphs.num_rows[4:] == at_start


def test_there_are_no_more_captures_than_memory_was_set_aside_for(model: Path, expected, monkeypatch, caplog):
    monkeypatch.setattr(ModelRunner, "most_captures", 2)
    platform = FakeDevice()
    loop = Loop(model, platform=platform)
    platform.graphs.num_rows.clear()
    with caplog.at_level("WARNING", "minivllm"):
        assert loop.run(PROMPTS, MIXED) == expected
    assert not platform.graphs.num_rows  # both, of the largest shape, were captured at the start
    assert caplog.text.count("2 decode steps are captured, which is what there is memory for") == 1


@pytest.mark.parametrize(
    "options", [{"max_cudagraph_capture_size": 8}, {"cudagraph_capture_at_start": True}], ids=str
)
def test_graphs_are_refused_where_nothing_is_captured(model: Path, options: dict):
    with pytest.raises(ConfigError, match=f"cpu captures no graphs; leave out.*{next(iter(options))}"):
        Loop(model, **options)


def test_captures_of_all_sizes_leave_their_results_in_one_place():
    graphs, places = CapturedGraphs(FakeGraphs(), 8, 4), set()
    for num_rows in (2, 8, 4, 2):
        logits = torch.full((num_rows, 3), float(num_rows))
        drawn, broken = graphs.run(num_rows, lambda x=logits: (x + 1, x[:, 0].long()))
        assert torch.equal(drawn, logits + 1) and torch.equal(broken, logits[:, 0].long())
        places.add((drawn.data_ptr(), broken.data_ptr()))
    assert len(places) == 1


def test_the_cache_is_a_share_of_what_was_free_when_weights_and_the_largest_step_are_taken_off(model: Path):
    options = {"num_gpu_blocks_override": None, "max_num_seqs": 4, "max_model_len": 512}
    ready = Loop(model, platform=FakeDevice(256 << 20), **options).ready
    half, step, capture = 128 << 20, 5 << 20, 1 << 20
    num_shapes = 3  # of 1, 2 and 4 rows
    least = step + capture + num_shapes * capture  # the second is of buffers
    assert half - least - step < ready.kv_cache_bytes < half - least
    with pytest.raises(ConfigError, match="lower it"):
        Loop(model, platform=FakeDevice(1 << 30), num_gpu_blocks_override=None, kv_cache_memory_bytes=1 << 30)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"enforce_eager": True}, {"logprobs_mode": "raw_logits"}, {"logprobs_mode": "processed_logprobs"},
        {"max_num_seqs": 1, "max_num_batched_tokens": 3},
    ],
)  # fmt: skip
def test_no_request_is_the_first_to_launch_a_kernel(model: Path, monkeypatch, options: dict):
    """Whatever it asks for; a kernel that is launched for the first time is compiled, and all others wait."""
    launched: set[str] = set()
    monkeypatch.setattr(Op, "select", recording_ops(Op.select, launched))
    loop = Loop(model, platform=FakeDevice(), **options)
    warm = set(launched)
    assert warm >= ON_LOGITS
    launched.clear()
    loop.run(PROMPTS, MIXED)
    assert launched and launched <= warm


def test_what_requests_have_made_on_a_device_is_there_when_its_memory_is_measured(model: Path, monkeypatch):
    kept: list[ModelRunner] = []
    run = warm_up.run

    def and_keep(runner: ModelRunner, *limits: int) -> None:
        run(runner, *limits)
        kept.append(runner)

    monkeypatch.setattr(warm_up, "run", and_keep)
    Loop(model, platform=FakeDevice(), max_num_seqs=4)
    (runner,) = kept
    assert len(runner.buffers._block_table[0]._table) == len(runner.table.num_tokens)
    assert len(runner._sampling._logits.counts._counts) == 4
    assert not runner.table.row_of


def test_an_upload_takes_what_the_host_had_then_and_its_place_is_not_reused_before_it_was_fetched():
    platform = FakeDevice()
    staging = Staging(platform)
    mirror = staging.mirror((4,), np.int64)
    for step in range(3):
        staging.begin()
        mirror.host[:] = step
        mirror.upload(4)
        staging.end()
        mirror.host[:] = -1  # the next step's, already
        assert mirror.device.tolist() == [step] * 4
    assert platform.num_events == 3


class Uploads:
    """How many rows of a kind each step sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_blocks: list[int] = []
        upload = Mirror.upload

        def counted(mirror: Mirror, num_rows: int) -> None:
            if mirror.host.ndim == 2:
                self.of_blocks.append(num_rows)
            upload(mirror, num_rows)

        monkeypatch.setattr(Mirror, "upload", counted)


def test_of_block_tables_only_rows_that_changed_are_sent(model: Path, expected, monkeypatch):
    loop = Loop(model, platform=FakeDevice(), plans_in_flight=2, max_num_seqs=4)
    uploads = Uploads(monkeypatch)
    answers = loop.run(PROMPTS, MIXED)
    assert answers == expected
    # A request's row is sent when it comes, and when it gets another block: of 32 tokens.
    lengths = [len(prompt) + len(answer.tokens) for prompt, answer in zip(PROMPTS, answers)]
    assert sum(uploads.of_blocks) <= len(PROMPTS) + sum(length // 32 + 1 for length in lengths)


def test_a_devices_block_table_is_the_hosts_through_all_that_happens_to_it():
    """Requests come, grow, are preempted and go; their rows are others' then, and the table grows."""
    staging, generator = Staging(FakeDevice()), np.random.default_rng(3)
    blocks, on_device = BlockTable(4, 6, 16), DeviceBlockTable(5, 6, staging)
    for step in range(200):
        if step == 50:
            blocks.grow(9)
        rows = generator.permutation(len(blocks.block_ids))[: generator.integers(1, 6)]
        for row in generator.permutation(rows)[: generator.integers(0, 3)].tolist():
            if blocks.num_blocks[row] == 6 or generator.random() < 0.3:
                blocks.replace(row, generator.integers(0, 1000, 2).tolist())
            else:
                blocks.append(row, [int(generator.integers(0, 1000))])
        staging.begin()
        on_device.of_step(blocks, rows, 6)
        staging.end()
        assert on_device.view(len(rows)).tolist() == blocks.block_ids[rows].tolist()


def test_a_batch_that_is_the_last_one_and_got_no_block_is_not_gathered_again():
    staging, rows = Staging(FakeDevice()), np.array([2, 0])
    blocks, on_device = BlockTable(4, 3, 16), DeviceBlockTable(4, 3, staging)
    blocks.replace(0, [5]), blocks.replace(2, [6, 7])
    on_device.of_step(blocks, rows, 3)
    blocks.block_ids[:] = 9  # told to nobody
    on_device._table.fill_(8)
    on_device.of_step(blocks, rows, 3)
    assert on_device.view(2).tolist() == [[6, 7, 0], [5, 0, 0]]


def test_where_memory_is_the_hosts_nothing_is_copied():
    mirror = Staging().mirror((3,), np.float32)
    mirror.host[:] = 5
    assert mirror.device.tolist() == [5, 5, 5]
    assert mirror.device.data_ptr() == mirror.host.ctypes.data
    assert torch.from_numpy(mirror.host).dtype == mirror.device.dtype


def test_a_whole_engine_plans_the_next_step_while_the_device_works_unless_told_otherwise(
    model: Path, monkeypatch, caplog
):
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=20, ignore_eos=True, detokenize=False)

    def answers(num_plans: int, **options) -> list[list[int]]:
        sizes = {"num_gpu_blocks_override": 64, "max_model_len": 256, "block_size": 32}
        with LLM(
            str(model), skip_tokenizer_init=True, disable_frontend_multiprocessing=True, **sizes, **options
        ) as llm:
            core = llm.llm_engine.engine_core._core
            most = 0

            def schedule(now: float, plan=core.scheduler.schedule):
                nonlocal most
                most = max(most, len(core._plans) + 1)
                return plan(now)

            core.scheduler.schedule = schedule
            tokens = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, params, use_tqdm=False)]
        assert most == core.executor.max_concurrent_batches == num_plans
        return tokens

    expected = answers(1)
    platform = FakeDevice()
    monkeypatch.setattr("minivllm.worker.worker.detect", lambda config: platform)
    assert answers(1, async_scheduling=False) == expected
    assert "async scheduling" not in caplog.text
    assert answers(2) == expected
    assert "async scheduling is on: the next step is planned while fake runs this one" in caplog.text
    assert platform.graphs.num_replays > 10


@pytest.mark.parametrize("options", [{}, {"load_format": "dummy"}, {"cudagraph_capture_at_start": True}], ids=str)
def test_a_device_that_has_slept_gives_the_same_answers_from_memory_that_lies_elsewhere(model: Path, options: dict):
    platform = FakeDevice()
    loop = Loop(model, platform=platform, plans_in_flight=2, enable_prefix_caching=False, **options)
    expected, worker = loop.run(PROMPTS[:3], MIXED[:3]), loop.worker
    runner = worker.runner
    tensors = [tensor for weight in runner.model.weights() for tensor in weight.tensors] + runner.kv_caches
    for levels in ((1,), (2,), (1, 2), (1, 1)):
        generation = platform.graphs.generation
        for level in levels:
            worker.sleep(level)
        assert platform.graphs.generation > generation  # a graph holds addresses
        assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)
        worker.wake_up(["weights"])
        assert not any(cache.untyped_storage().nbytes() for cache in runner.kv_caches)
        worker.wake_up(["kv_cache"])
        assert loop.run(PROMPTS[:3], MIXED[:3], seeds=[0, 1, 2]) == expected


def test_a_device_whose_memory_others_took_meanwhile_says_so_and_may_be_woken_again(model: Path, monkeypatch):
    loop = Loop(model, platform=FakeDevice(), enable_prefix_caching=False)
    expected = loop.run(PROMPTS[:1], MIXED[0])
    loop.worker.sleep(1)

    def full(storage, size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as others:
        others.setattr(torch.UntypedStorage, "resize_", full)
        with pytest.raises(EngineError, match="end what uses it and wake up again"):
            loop.worker.wake_up()
    loop.worker.wake_up()
    assert loop.run(PROMPTS[:1], MIXED[0]) == expected


def test_weights_come_to_the_device_through_pinned_memory_piece_by_piece(model: Path, monkeypatch):
    monkeypatch.setattr(PinnedStream, "piece_bytes", 3000)  # rows are smaller, tensors larger
    platform = FakeDevice()
    assert Loop(model, platform=platform).run(PROMPTS[:1], MIXED[0]) == Loop(model).run(PROMPTS[:1], MIXED[0])
    assert platform.num_events > 100


def test_a_damaged_checkpoint_is_found_out_on_the_way_to_the_device(model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFilesError, match="down_proj.weight holds a NaN"):
        Loop(tmp_path, platform=FakeDevice())
