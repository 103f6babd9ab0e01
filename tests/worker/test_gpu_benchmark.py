"""benchmarks/gpu without a GPU: it says so, and what does not need one runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import kernels, models, start
from benchmarks.gpu.clock import Ceilings, Clock
from minivllm.attention import registry
from tests.worker.fake_device import FakeDevice

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    **models.SHAPES["1B"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip


def test_it_measures_nothing_without_a_card_and_says_so():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("NOTHING WAS MEASURED: torch")
    assert "in this order: attention, captured, cuda-decode, decode-8B, start-8B" in done.stderr


def test_steps_of_a_model_are_measured_as_a_server_makes_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_BACKENDS", ["tests.worker.fake_device:FakeDeviceBackend"])
    platform = FakeDevice()
    model = models.Model(
        TINY,
        platform=platform,
        device="cpu",
        max_model_len=256,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=40,
    )
    clock = Clock("cpu")
    ceilings = Ceilings(clock, size=1 << 20, product=64)
    times_left = iter([True] * 5 + [False] * 3)
    rows = list(models.run(
        "tiny", model, ceilings, batches=(1, 4, 200), contexts=(100,), prompts=(64, 32), steps=5,
        asking=(4,), is_time_left=lambda: next(times_left),
    ))  # fmt: skip
    assert rows.pop() == models.Row("tiny prefill of 32", "-", "-", "not run: out of time")
    assert [row.what for row in rows][-1] == "tiny prefill of 64"
    assert rows.pop(0).what == "tiny capturing a decode step"
    assert "do not fit" in rows[2].note and "penalties" in rows[3].what
    assert all(float(row.rate.replace(",", "")) > 0 for row in rows if row is not rows[2])
    assert platform.graphs.num_replays > 8
    assert len(models.sampling(512, 4, "cpu", clock)) == 6


def test_the_price_of_batch_invariance_is_of_the_same_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_BACKENDS", ["tests.worker.fake_device:FakeDeviceBackend"])
    asked = []

    def make(*, batch_invariant: bool) -> models.Model:
        asked.append(batch_invariant)
        return models.Model(
            TINY, platform=FakeDevice(), device="cpu", max_model_len=256, batch_invariant=batch_invariant,
            num_gpu_blocks_override=40,
        )  # fmt: skip

    rows = list(models.price_of_invariance("tiny", make, batches=(1, 4), context=100, num_tokens=64, steps=3))
    assert asked == [False, True]
    assert [row.what for row in rows] == [
        f"tiny batch invariant {what}"
        for what in ("decode, batch 1, context 100", "decode, batch 4, context 100", "prefill of 64")
    ]
    assert all("× the" in row.note for row in rows)


def test_the_gain_of_decoding_in_cuda_is_of_the_same_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_BACKENDS", ["tests.worker.fake_device:FakeDeviceBackend"])
    made = []

    def make(*, cuda_decode: bool) -> models.Model:
        made.append(models.Model(
            TINY, platform=FakeDevice(), device="cpu", max_model_len=256, cuda_decode=cuda_decode,
            num_gpu_blocks_override=40,
        ))  # fmt: skip
        made[-1].asked = made[-1].worker.config.device.cuda_decode_attention
        return made[-1]

    rows = list(models.gain_of_cuda_decode("tiny", make, sizes=((1, 100), (4, 50)), steps=3))
    assert [model.asked for model in made] == [False, True]
    assert [row.what for row in rows] == [
        f"tiny decode in CUDA C++, batch {batch}, context {context}" for batch, context in ((1, 100), (4, 50))
    ]
    assert all("by Triton" in row.note for row in rows)


def test_kernels_of_other_models_are_measured(monkeypatch: pytest.MonkeyPatch):
    sizes = {
        "HIDDEN": 64,
        "INNER": 96,
        "VOCAB": 100,
        "EXPERTS": 8,
        "EXPERTS_OF_TOKEN": 2,
        "EXPERT_HIDDEN": 32,
    }
    for name, size in {**sizes, "EXPERT_INNER": 16}.items():
        monkeypatch.setattr(kernels, name, size)
    clock = Clock("cpu")
    ceilings = Ceilings(clock, size=1 << 20, product=64)
    made = [*kernels.pointwise_kernels("cpu", (1, 5)), *kernels.expert_kernels("cpu", (1, 5))]
    results = [kernels.measure(kernel, clock, ceilings) for kernel in made]
    assert len(results) == 8 and all(result.seconds > 0 for result in results)
    assert made[6].num_bytes == 2 * 3 * 16 * 32 * 2 + 2 * 32 * 2  # one row reads two experts


def test_a_start_is_a_command_of_its_own_and_what_cannot_start_says_why():
    options = {"device": "cpu", "max_model_len": 256, "kv_cache_memory_bytes": 16 << 20}
    rows = list(start.run("tiny", TINY, limit_s=lambda: 100.0, **options))
    assert [row.what.split(", ", 1)[1] for row in rows] == [
        "LLM, kernels compiled", "LLM, kernels on disk", "server, kernels on disk",
    ]  # fmt: skip
    assert all(float(row.note.split(" s;")[0]) > 0 for row in rows), rows
    with pytest.raises(RuntimeError, match="no token within 9 s: .*no_such_directory"):
        start.of_llm("./no_such_directory", {"device": "cpu"}, dict(os.environ), 9.0)
