"""--cpu-threads and --cpu-bind: what is read, what is refused, and where the kernels' threads then run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from minivllm.config.cpu import CpuConfig, read_cpu_bind
from minivllm.exceptions import ConfigError
from minivllm.platforms.cpu import CpuPlatform
from minivllm.utils import native

needs_linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="nothing is bound here")
needs_kernels = pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable))


@needs_linux
def test_auto_is_every_processor_of_the_process_and_none_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {8, 0, 2})
    assert read_cpu_bind("auto") == [0, 2, 8]
    assert read_cpu_bind("none") is None


@needs_linux
def test_a_list_keeps_its_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert read_cpu_bind("8,0-3,8") == [8, 0, 1, 2, 3]


@needs_linux
@pytest.mark.parametrize("text", ["", "all", "0-", "3-1", "-1", "0,,1", "0-1-2", "١"])
def test_what_is_no_list_is_refused_with_what_to_say(text: str):
    with pytest.raises(ConfigError, match="none, auto, or such as 0-3,8"):
        read_cpu_bind(text)


@needs_linux
def test_a_processor_of_others_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(ConfigError, match="processor 2 is not one"):
        read_cpu_bind("0-2")


@needs_linux
@needs_kernels
def test_the_kernels_threads_are_as_many_as_asked_and_bound_where_asked():
    code = """
import os, torch
from minivllm.config.cpu import CpuConfig
from minivllm.ops import activation, native
from minivllm.platforms.platform import detect
here = min(os.sched_getaffinity(0))
detect().prepare(CpuConfig(cpu_threads=3, cpu_bind=str(here)))
activation.cpu(torch.randn(64, 512))
assert native.lib.num_threads() == 3
assert os.sched_getaffinity(0) == {here}
bound = [os.sched_getaffinity(int(task)) == {here} for task in os.listdir("/proc/self/task")]
assert sum(bound) >= 3, bound
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_without_kernels_the_log_says_why_and_that_it_is_slow(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(native, "unavailable", "no native kernel for this processor: x86-64 with AVX2 is needed")
    monkeypatch.setattr(torch, "set_num_threads", lambda num_threads: None)
    with caplog.at_level("WARNING", "minivllm"):
        CpuPlatform().prepare(CpuConfig())
    assert "x86-64 with AVX2 is needed; PyTorch serves in its place, many times slower" in caplog.text
