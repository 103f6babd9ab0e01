"""benchmarks/gpu without a GPU: it says so, and what does not need one runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import models
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
    assert "in this order: attention, decode-8B" in done.stderr


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
    assert len(models.sampling(512, 4, "cpu", clock)) == 4
