"""What is captured as a graph: vLLM's flags and the keys of --compilation-config, one meaning for both."""

from __future__ import annotations

import pytest

from minivllm.config.compilation import CaptureOptions, CompilationConfig, read_compilation
from minivllm.engine.arg_utils import EngineArgs
from minivllm.exceptions import ConfigError


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, CaptureOptions()),
        ({"cudagraph_capture_sizes": [8, 1, 2, 2]}, CaptureOptions(sizes=(1, 2, 8))),
        ({"compilation_config": {"cudagraph_capture_sizes": [4]}}, CaptureOptions(sizes=(4,))),
        ({"max_cudagraph_capture_size": 64}, CaptureOptions(largest=64)),
        ({"cudagraph_capture_at_start": True}, CaptureOptions(at_start=True)),
        ({"compilation_config": {"cudagraph_mode": "NONE", "mode": 0}}, CaptureOptions(is_off=True)),
        ({"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}, CaptureOptions()),
    ],
    ids=str,
)
def test_what_is_asked_for_is_read(given: dict, options: CaptureOptions):
    assert read_compilation(CompilationConfig(**given)) == options


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"cudagraph_capture_sizes": []}, "for none: --enforce-eager"),
        ({"cudagraph_capture_sizes": [0, 1]}, r"\[0, 1\] must be numbers of at least 1"),
        ({"max_cudagraph_capture_size": 0}, "0 must be at least 1"),
        ({"cudagraph_capture_sizes": [1, 8], "max_cudagraph_capture_size": 4}, "4 is not the largest"),
        ({"cudagraph_capture_sizes": [1], "compilation_config": {"cudagraph_capture_sizes": [2]}}, "contradict"),
        ({"cudagraph_capture_sizes": [1], "compilation_config": {"cudagraph_mode": "NONE"}}, "mode=NONE captures no"),
        ({"cudagraph_capture_sizes": [1], "enforce_eager": True}, "--enforce-eager captures no graphs"),
        ({"cudagraph_capture_at_start": True, "enforce_eager": True}, "capture_at_start asks for some; leave one out"),
        ({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, "say FULL_DECODE_ONLY or NONE"),
        ({"compilation_config": {"mode": 3}}, "mode=3 asks for torch.compile"),
        ({"compilation_config": {"use_inductor": True}}, "unknown field use_inductor"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_its_name(tiny_model, given: dict, why: str):
    with pytest.raises(ConfigError, match=why):
        EngineArgs(str(tiny_model), **given).create_engine_config()
