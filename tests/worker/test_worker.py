"""The worker as the executor sees it: what it resolves, what it refuses, and that answers are a request's alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from make_random_model import make_model
from safetensors.torch import load_file, save_file

from minivllm.config import scheduler
from minivllm.exceptions import ConfigError, ModelFilesError
from minivllm.messages.worker import ModelRunnerOutput, SchedulerOutput
from minivllm.ops import native
from minivllm.ops.op import OpSpec
from minivllm.sample.sampler import NONFINITE
from minivllm.sampling_params import SamplingParams
from minivllm.worker.worker import Worker
from tests.models.loop import Answer, Loop, engine_config
from tests.resident_memory import resident_bytes

NOT_NATIVE = native.why_not(OpSpec("cpu", torch.bfloat16))
# The lengths at which a request soon needs one block more: five blocks of 32 cannot hold them all.
PROMPTS = [[7 + (i * 13 + length) % 490 for i in range(length)] for length in (60, 3, 62, 33, 1)]


@pytest.fixture(scope="module")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bf16"), arch="qwen3", dtype="bfloat16", head_dim=32, seed=5)


def initialize(model: Path, **options):
    return Worker(engine_config(model, **{"num_gpu_blocks_override": 128} | options)).initialize(
        lambda phase: None
    )


# What it resolves ------------------------------------------------------------


def test_it_reports_what_it_resolved(tiny_model: Path):
    ready = initialize(
        tiny_model, max_model_len=None, block_size=None, max_num_seqs=3, num_gpu_blocks_override=20
    )
    assert (ready.max_model_len, ready.num_blocks, ready.block_size) == (2048, 20, 128)
    assert (
        ready.kv_cache_bytes == 20 * 128 * 2 * 2 * 2 * 16 * 4
    )  # tokens, K and V, layers, KV heads, head_dim, bytes
    assert (ready.dtype, ready.max_num_seqs) == ("float32", 3)
    assert ready.numerics_id.startswith("cpu-")


def test_a_smaller_kv_cache_type_holds_more_tokens_in_as_many_bytes(bf16_model: Path):
    def ready(kv_cache_dtype):
        return initialize(
            bf16_model, kv_cache_dtype=kv_cache_dtype, num_gpu_blocks_override=None, kv_cache_memory_bytes=1 << 20
        )

    auto, fp8, int8 = ready("auto"), ready("fp8"), ready("int8")
    assert fp8.num_blocks == 2 * auto.num_blocks
    assert auto.num_blocks * 1.7 < int8.num_blocks < fp8.num_blocks  # its scales take 4 bytes beside 32
    assert len({auto.numerics_id, fp8.numerics_id, int8.numerics_id}) == 3  # they give other bits


@pytest.mark.parametrize(("kv_cache_dtype", "scale"), [("fp8", 0.5), ("auto", 1.0)])
def test_the_checkpoints_kv_scales_are_for_fp8(bf16_model: Path, tmp_path: Path, kv_cache_dtype, scale):
    shutil.copytree(bf16_model, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_scale"] = torch.tensor(0.5)
    tensors["model.layers.1.self_attn.v_scale"] = torch.tensor([0.5])
    save_file(tensors, tmp_path / "model.safetensors")
    worker = Worker(engine_config(tmp_path, kv_cache_dtype=kv_cache_dtype, num_gpu_blocks_override=8))
    worker.initialize(lambda phase: None)
    first, second = (layer.self_attn.attention.options for layer in worker.runner.model.layers[:2])
    assert (first.k_scale, first.v_scale, second.k_scale, second.v_scale) == (1, 1, scale, scale)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-30, 1e30])
def test_a_scale_that_would_show_what_no_row_may_see_is_refused(bf16_model: Path, tmp_path: Path, scale: float):
    shutil.copytree(bf16_model, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_scale"] = torch.tensor(scale)
    save_file(tensors, tmp_path / "model.safetensors")
    worker = Worker(engine_config(tmp_path, kv_cache_dtype="fp8", num_gpu_blocks_override=8))
    with pytest.raises(ModelFilesError, match=r"k_scale of layer 1 is .*; it must be a number from"):
        worker.initialize(lambda phase: None)


def test_auto_takes_the_length_that_fits(tiny_model: Path):
    assert initialize(tiny_model, max_model_len="auto", num_gpu_blocks_override=5).max_model_len == 5 * 32


# Windows beside full attention ------------------------------------------------


@pytest.fixture(scope="module")
def mixed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 2 and 5 see everything, the others 40 tokens."""
    path = tmp_path_factory.mktemp("mixed")
    return make_model(path, arch="gemma3", num_layers=6, sliding_window_pattern=3, sliding_window=40, seed=5)


def test_groups_give_the_bits_that_full_attention_everywhere_gives(mixed_model: Path):
    prompts = [[(i * 31 + length) % 500 for i in range(length)] for length in (300, 33, 32, 5, 97, 150)]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=3)
    grouped = Loop(mixed_model, max_num_batched_tokens=48)
    whole = Loop(mixed_model, max_num_batched_tokens=48, disable_hybrid_kv_cache_manager=True)
    assert [(each.sliding_window, each.layers) for each in grouped.ready.kv_cache_groups] == [
        (40, (0, 3)), (40, (1, 4)), (None, (2, 5)),
    ]  # fmt: skip
    assert [each.layers for each in whole.ready.kv_cache_groups] == [(0, 1, 2, 3, 4, 5)]
    expected = whole.run(prompts, params)
    assert grouped.run(prompts, params) == expected
    again = grouped.run(prompts, params)
    assert again == expected
    assert [answer.num_cached_tokens for answer in again] == [288, 32, 0, 0, 96, 128]
    tight = Loop(mixed_model, max_num_batched_tokens=48, num_gpu_blocks_override=25, max_model_len=400)
    assert tight.run(prompts * 2, params) == expected * 2
    assert tight.num_preemptions > 0


def test_the_same_memory_holds_more_where_windows_let_go(mixed_model: Path):
    num_bytes = 60 << 14  # blocks of two layers take 16 KiB, of six 48
    options = {"num_gpu_blocks_override": None, "kv_cache_memory_bytes": num_bytes, "max_num_batched_tokens": 48}
    grouped = initialize(mixed_model, **options)
    whole = initialize(mixed_model, disable_hybrid_kv_cache_manager=True, **options)
    assert grouped.kv_cache_bytes == whole.kv_cache_bytes
    assert grouped.max_model_len > 2 * whole.max_model_len


def test_dtype_auto_is_the_checkpoints_own(bf16_model: Path):
    assert initialize(bf16_model).dtype == "bfloat16"
    assert initialize(bf16_model, dtype="float").dtype == "float32"


def test_progress_is_told_phase_by_phase(tiny_model: Path):
    phases: list[str] = []
    Worker(engine_config(tiny_model, num_gpu_blocks_override=8)).initialize(phases.append)
    assert phases == ["checking the model", "loading weights", "laying out the KV cache"]


# Sleep -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"quantization": "int8"}, {"quantization": "int4"}, {"load_format": "dummy"}], ids=str
)
def test_a_worker_that_has_slept_gives_the_same_answers(bf16_model: Path, options: dict):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
    loop = Loop(bf16_model, enable_prefix_caching=False, **options)
    expected = loop.run(PROMPTS, params)
    for level in (1, 2):
        loop.worker.sleep(level)
        assert not loop.worker.runner.is_recorded  # what was recorded holds memory, and the scales of old weights
        loop.worker.wake_up()
        assert loop.run(PROMPTS, params) == expected
        assert loop.worker.runner.is_recorded == (native.unavailable is None)


def test_asleep_the_memory_of_the_cache_and_at_level_2_of_the_weights_is_given_back(tmp_path: Path):
    model = make_model(tmp_path, arch="qwen3", dtype="float32", hidden_size=512, intermediate_size=4096, num_layers=4)
    worker = Worker(engine_config(model, num_gpu_blocks_override=2000))
    worker.initialize(lambda phase: None)
    for cache in worker.runner.kv_caches:
        cache.view(torch.uint8).fill_(1)  # as if it had been full
    cache_bytes = sum(cache.nbytes for cache in worker.runner.kv_caches)
    weight_bytes = sum(weight.num_bytes for weight in worker.runner.model.weights())
    assert min(cache_bytes, weight_bytes) > 32 << 20  # more than what else may move
    rss = [worker.platform.process_memory_bytes()]
    for level in (1, 2):
        worker.sleep(level)
        rss.append(worker.platform.process_memory_bytes())
    assert rss[0] - rss[1] > 0.9 * cache_bytes
    assert rss[1] - rss[2] > 0.9 * weight_bytes
    worker.wake_up()
    assert worker.platform.process_memory_bytes() - rss[2] > 0.9 * weight_bytes


@pytest.mark.skipif(NOT_NATIVE is not None, reason="only native calls are recorded")
@pytest.mark.parametrize("level", [1, 2])
def test_asleep_the_memory_that_steps_compute_in_is_given_back_too(tmp_path: Path, level: int):
    model = make_model(tmp_path, arch="llama", dtype="float32", intermediate_size=8192, num_layers=2)
    loop = Loop(model, max_num_batched_tokens=1024, enable_prefix_caching=False)
    prompt, params = [7 + i % 490 for i in range(1024)], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    rss = loop.worker.platform.process_memory_bytes
    expected = loop.run([prompt], params)
    step_bytes, awake = loop.worker.runner._recorded.recording.nbytes, rss()
    assert step_bytes > 32 << 20  # more than what else may move
    loop.worker.sleep(level)
    asleep = rss()
    assert awake - asleep > 0.9 * step_bytes
    loop.worker.wake_up()
    assert loop.run([prompt], params) == expected
    assert rss() - asleep > 0.9 * step_bytes


def test_weights_that_cannot_be_read_again_leave_a_worker_that_may_try_again(bf16_model: Path, tmp_path: Path):
    shutil.copytree(bf16_model, tmp_path, dirs_exist_ok=True)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    loop = Loop(tmp_path, enable_prefix_caching=False)
    expected = loop.run(PROMPTS, params)
    loop.worker.sleep(2)
    hidden = (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises((OSError, ConfigError)):
        loop.worker.wake_up()
    hidden.rename(tmp_path / "model.safetensors")
    loop.worker.wake_up()
    assert loop.run(PROMPTS, params) == expected


# What it refuses -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 2049}, "--max-model-len 2049 is more than the 2048"),
        ({"max_model_len": 200, "num_gpu_blocks_override": 6}, "--max-model-len 192 or auto"),
        ({"block_size": 33}, "--block-size 33 is not a multiple of 32"),
        (
            {"max_model_len": 1024, "enable_chunked_prefill": False, "max_num_batched_tokens": 1000},
            "max_num_batched_tokens=1000 is less than max_model_len=1024",
        ),
        ({"num_gpu_blocks_override": 1 << 40}, "--num-gpu-blocks-override"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused_before_a_weight_is_read(
    tiny_model: Path, options: dict, message: str
):
    phases: list[str] = []
    with pytest.raises(ConfigError) as caught:
        Worker(engine_config(tiny_model, **{"num_gpu_blocks_override": 128} | options)).initialize(
            phases.append
        )
    assert message in str(caught.value)
    assert phases == ["checking the model"]


def test_without_chunked_prefill_a_step_holds_the_longest_prompt(tiny_model: Path):
    model_len = {"max_model_len": 2048, "enable_chunked_prefill": False}
    assert initialize(tiny_model, **model_len).max_num_batched_tokens == 2048


@pytest.mark.parametrize("num_blocks", [10, 128])
def test_without_chunked_prefill_a_step_holds_the_length_that_auto_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, num_blocks: int
):
    monkeypatch.setitem(scheduler._STEP_DEFAULTS, "serve", (64, 4))
    limits = {"max_model_len": "auto", "enable_chunked_prefill": False}
    ready = initialize(tiny_model, **limits, num_gpu_blocks_override=num_blocks)
    assert ready.max_model_len == min(2048, num_blocks * 32)
    assert ready.max_num_batched_tokens == ready.max_model_len
    with pytest.raises(ConfigError, match=f"=48 is less than max_model_len={ready.max_model_len}"):
        initialize(tiny_model, **limits, num_gpu_blocks_override=num_blocks, max_num_batched_tokens=48)


# What it answers -------------------------------------------------------------


def mixed_params() -> list[SamplingParams]:
    common = {"max_tokens": 10, "ignore_eos": True, "logprobs": 2}
    return [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0.8, top_p=0.9, **common),
        SamplingParams(temperature=1.2, top_k=20, repetition_penalty=1.2, **common),
        SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.2, **common),
        SamplingParams(temperature=1.0, min_p=0.05, logit_bias={5: 1.0}, **common),
    ]


@pytest.mark.skipif(NOT_NATIVE is not None, reason=f"only the native kernels promise bits: {NOT_NATIVE}")
def test_in_bfloat16_a_crowd_chunks_and_preemption_change_no_bit(bf16_model: Path):
    alone = [
        Loop(bf16_model).run([prompt], [params], seeds=[seed])[0]
        for seed, (prompt, params) in enumerate(zip(PROMPTS, mixed_params()))
    ]
    seeds = list(range(5))
    crowd = Loop(bf16_model).run(PROMPTS, mixed_params(), seeds=seeds, stagger=2)
    assert crowd == alone
    tight = Loop(
        bf16_model, max_num_batched_tokens=17, num_gpu_blocks_override=5, enable_prefix_caching=False
    )
    assert tight.run(PROMPTS, mixed_params(), seeds=seeds) == alone
    assert tight.num_preemptions > 0


def test_a_request_sent_again_with_its_output_so_far_goes_on_with_the_same_tokens(bf16_model: Path):
    whole = Loop(bf16_model).run(PROMPTS, mixed_params())
    prior = [answer.tokens[:4] for answer in whole]
    rest = Loop(bf16_model).run(PROMPTS, mixed_params(), prior=prior)
    assert [answer.tokens for answer in rest] == [answer.tokens[4:] for answer in whole]
    assert [answer.logprobs for answer in rest] == [answer.logprobs[4:] for answer in whole]


def test_min_tokens_holds_an_end_token_back(tiny_model: Path):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    free = Loop(tiny_model).run([[9, 8, 7]], params)[0].tokens
    ending = params.clone(ignore_eos=False)
    assert Loop(tiny_model).run([[9, 8, 7]], ending, eos_token_ids=[free[2]])[0].tokens == free[:3]
    held = Loop(tiny_model).run([[9, 8, 7]], ending.clone(min_tokens=6), eos_token_ids=[free[2]])[0].tokens
    assert len(held) >= 6
    assert held[:2] == free[:2]
    assert free[2] not in held[:6]


def test_a_prompt_and_its_output_may_fill_the_context(tiny_model: Path):
    loop = Loop(tiny_model, max_model_len=64)
    answers = loop.run([[5] * 60, [6] * 63], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    assert [len(answer.tokens) for answer in answers] == [4, 1]
    assert [answer.finish_reason for answer in answers] == ["length", "length"]


@pytest.mark.parametrize("kept", [True, False], ids=["logits kept", "logits not kept"])
def test_a_request_whose_logits_are_not_finite_fails_and_the_others_go_on(tiny_model: Path, kept: bool):
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    healthy = Loop(tiny_model).run(PROMPTS, params)
    loop = Loop(tiny_model)
    poisoned = PoisonedModel if kept else ChoosingPoisonedModel
    # The first decode that is computed: behind the prompts' step, and three times for a recording.
    loop.worker.runner.model = poisoned(loop.worker.runner.model, row=-1, step=4)
    answers = loop.run(PROMPTS, params)
    (failed,) = [i for i, answer in enumerate(answers) if answer.finish_reason == "error"]
    assert answers[failed].error == NONFINITE
    assert 0 < len(answers[failed].tokens) < 6
    assert answers[failed].tokens == healthy[failed].tokens[: len(answers[failed].tokens)]
    assert without(answers, failed) == without(healthy, failed)


def test_a_step_without_tokens_gives_an_empty_result(tiny_model: Path):
    worker = Loop(tiny_model).worker
    worker.execute_model(SchedulerOutput(step=1, finished_req_ids=["nobody"]))
    assert worker.sample_tokens(None) == ModelRunnerOutput()


def test_shutdown_lets_go_and_may_be_repeated(tiny_model: Path):
    worker = Loop(tiny_model).worker
    worker.shutdown()
    worker.shutdown()
    assert worker.runner is None


def test_a_model_without_a_named_dtype_is_bfloat16(tmp_path: Path):
    path = make_model(tmp_path, arch="llama")
    config = json.loads((path / "config.json").read_text())
    config.pop("torch_dtype")
    (path / "config.json").write_text(json.dumps(config))
    assert initialize(path).dtype == "bfloat16"


class PoisonedModel:
    """A model that gives one NaN, in one row of one step's logits."""

    can_choose = False  # else it would be asked for tokens

    def __init__(self, model, *, row: int, step: int) -> None:
        self._model, self._row, self._step, self._num_steps = model, row, step, 0

    def forward(self, *args) -> torch.Tensor:
        return self._model.forward(*args)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._model.compute_logits(hidden)
        if self._num_steps == self._step:
            logits[self._row, 11] = float("nan")
        self._num_steps += 1
        return logits


class ChoosingPoisonedModel(PoisonedModel):
    """The same in a row of hidden states, of which no logits are kept."""

    can_choose = True

    def likeliest(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._num_steps == self._step:
            hidden[self._row, 3] = float("nan")
        self._num_steps += 1
        return self._model.likeliest(hidden)


def without(answers: list[Answer], dropped: int) -> list[Answer]:
    return [answer for i, answer in enumerate(answers) if i != dropped]


@pytest.mark.parametrize("touches", [False, True])
def test_touching_the_kv_cache_takes_all_of_its_memory(touches: bool, tmp_path: Path):
    sizes = {"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 160 << 20}  # too large for memory that was freed
    loop = Loop(make_model(tmp_path, arch="llama", num_layers=2), touch_kv_cache=touches, **sizes)
    if touches:
        loop.worker.memory_taker.wait()
    caches = loop.worker.runner.kv_caches
    share = sum(map(resident_bytes, caches)) / sum(cache.nbytes for cache in caches)
    assert share > 0.9 if touches else share < 0.5
    assert not any(cache.any() for cache in caches)


def test_no_memory_is_taken_ahead_while_a_prompt_is_computed(tiny_model: Path):
    loop, taker = Loop(tiny_model), FakeTaker()
    loop.worker.memory_taker = taker
    loop.run([PROMPTS[0]], SamplingParams(max_tokens=3, temperature=0))
    assert taker.held[:2] == [True, False] and not any(taker.held[2:])


@pytest.mark.parametrize("part", ["forward", "compute_logits"])
def test_memory_is_taken_again_behind_a_prompt_whose_step_fails(tiny_model: Path, monkeypatch, part: str):
    loop, taker = Loop(tiny_model, enforce_eager=True), FakeTaker()
    loop.worker.memory_taker = taker

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(loop.worker.runner.model, part, fails)
    monkeypatch.setattr(loop.worker.runner.model, "likeliest", fails)
    with pytest.raises(ZeroDivisionError):
        loop.run([PROMPTS[0]], SamplingParams(max_tokens=3, temperature=0))
    assert taker.held == [True, False]


class FakeTaker:
    def __init__(self) -> None:
        self.held: list[bool] = []

    def hold(self, on: bool) -> None:
        self.held.append(on)
