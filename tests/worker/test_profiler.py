"""Which steps a recording covers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from minivllm.config.profiler import ProfilerConfig
from minivllm.worker.profiler import WorkerProfiler


def test_a_recording_of_so_many_steps_begins_late_and_ends_with_them(tmp_path: Path):
    config = ProfilerConfig(
        torch_profiler_dir=str(tmp_path), torch_profiler_with_stack=False, torch_profiler_use_gzip=False
    )
    profiler = WorkerProfiler(config)
    assert profiler.start("x", delay=1, most=2) and not profiler.start("y", None, None)
    for i in range(5):
        profiler.before_step()
        with torch.profiler.record_function(f"step {i}"):
            pass
        profiler.after_step()
    trace, table = map(Path, profiler.stop())
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {name for name in names if name.startswith("step ")} == {"step 1", "step 2"}
    assert "step 1" in table.read_text()
    assert profiler.start("y", None, None)
