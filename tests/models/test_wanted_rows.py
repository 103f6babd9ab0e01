"""The last layer behind its attention, for the rows that somebody reads alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from make_random_model import make_model

from minivllm.attention.backend import ForwardContext
from minivllm.ops import native
from tests.models.loop import Loop

LENGTHS = (40, 1, 9)


@pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable))
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wanted_rows_have_the_bits_they_have_among_all(tmp_path: Path, arch: str, dtype: str):
    runner = Loop(make_model(tmp_path, arch=arch, num_layers=2, dtype=dtype, seed=3)).worker.runner
    batch = runner.buffers.made_up(LENGTHS)
    metadata = runner.backend.build_metadata(batch.steps[0])
    caches = [torch.zeros_like(cache) for cache in runner.kv_caches]

    def hidden(wanted: torch.Tensor | None) -> torch.Tensor:
        ctx = ForwardContext([metadata] * len(runner.model.layers), caches, wanted)
        with torch.inference_mode():
            return runner.model.forward(batch.input_ids, batch.positions, ctx)

    assert batch.wanted.tolist() == [39, 40, 49]
    for wanted in (batch.wanted, torch.tensor([7]), torch.arange(sum(LENGTHS))):
        assert torch.equal(hidden(wanted), hidden(None)[wanted])
