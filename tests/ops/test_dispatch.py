"""Choosing the instruction set and the threads; who serves when the native kernels cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from minivllm import envs
from minivllm.exceptions import ConfigError
from minivllm.ops import activation, native
from minivllm.ops.op import OpSpec
from minivllm.utils import native as door

ISAS = native.lib.supported_isas() if native.lib is not None else []
OWN_ISAS = ("avx512_vnni", "avx512_bf16")
needs_kernels = pytest.mark.skipif(
    native.lib is None or native.lib.isa() == "none", reason="no native kernels here"
)

needs_two_processors = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two processors"
)


def import_native(**variables):
    """A fresh interpreter that imports the ops and prints the instruction set and thread count."""
    code = "from minivllm.ops import native; print(native.lib.isa(), native.lib.num_threads())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@needs_kernels
def test_the_best_instruction_set_is_used_unless_told_otherwise():
    assert native.lib.isa() == native.lib.default_isa() or envs.get("MINIVLLM_CPU_ISA")


@needs_kernels
def test_the_instruction_set_can_be_lowered_and_raised_again(isa):
    assert native.lib.isa() == isa


@needs_kernels
def test_an_unknown_instruction_set_is_refused_by_name():
    known = ", ".join(["avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
    with pytest.raises(ValueError, match=f"unknown instruction set 'sse9'; known: {known}"):
        native.lib.set_isa("sse9")


@needs_kernels
def test_the_variable_lowers_the_instruction_set():
    result = import_native(MINIVLLM_CPU_ISA="avx2")
    assert result.stdout.split()[0] == "avx2", result.stderr


MASKED = Path(__file__).with_name("masked_cpuid.cpp")
COMPILER = shutil.which("g++") or shutil.which("clang++")
AMX_TILE, AVX512_FP16, AVX512_BF16, AVX512_VNNI = "7:0:3:24", "7:0:3:23", "7:1:0:5", "7:0:2:11"
AVX512F, AVX2, FMA = "7:0:1:16", "7:0:1:5", "1:0:2:12"
# What a processor lacks, the set it uses by default, and the last it can use.
LACKS = [
    ((), "amx", "amx"),
    ((AMX_TILE,), "avx512_vnni", "avx512_bf16"),  # Intel's with AVX512_FP16 have slow products of pairs
    ((AMX_TILE, AVX512_FP16), "avx512_bf16", "avx512_bf16"),
    ((AVX512_BF16,), "avx512_vnni", "avx512_vnni"),
    ((AVX512_VNNI,), "avx512", "avx512"),
    ((AVX512F,), "avx2", "avx2"),
    ((AVX2,), "none", None),
    ((FMA,), "none", None),
]


def has_all_features() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return "amx" in ISAS and cpuinfo.exists() and "avx512_fp16" in cpuinfo.read_text()


@pytest.mark.skipif(COMPILER is None or not has_all_features(), reason="NOT RUN: needs Linux, C++, AMX, AVX512_FP16")
def test_a_processor_that_lacks_a_feature_never_uses_a_set_that_needs_it(tmp_path):
    masks = tmp_path / "masked.so"
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", MASKED, "-o", masks], check=True)
    code = "from minivllm.utils.native import lib; print(lib.isa(), *lib.supported_isas())"
    for lacks, used, last in LACKS:
        env = {**os.environ, "LD_PRELOAD": str(masks), "MASKED_CPUID": ",".join(lacks), "MINIVLLM_CPU_ISA": ""}
        result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        if result.returncode == 77:
            pytest.skip("NOT RUN: the processor answers `cpuid` itself, always")
        supported = ISAS[: ISAS.index(last) + 1] if last else []
        assert result.stdout.split() == [used, *supported], (lacks, result.stderr)


@needs_kernels
def test_a_variable_that_cannot_be_parsed_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("MINIVLLM_CPU_ISA", "avx9")
    with pytest.raises(ConfigError, match="MINIVLLM_CPU_ISA='avx9'"):
        door._apply_environment(native.lib)


@needs_kernels
def test_fewer_than_one_thread_is_refused():
    with pytest.raises(ValueError, match="num_threads=0"):
        native.lib.set_num_threads(0)


@needs_kernels
def test_kernels_called_from_many_python_threads_take_turns(num_threads):
    inputs = [torch.randn(64, 512) for _ in range(4)]
    expected = [activation.cpu(x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(50):
            if not torch.equal(activation.cpu(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_kernels
def test_the_threads_can_change_while_kernels_run():
    x, before = torch.randn(64, 512), native.lib.num_threads()
    expected, stop, wrong = activation.cpu(x), threading.Event(), []

    def work():
        while not stop.is_set():
            if not torch.equal(activation.cpu(x), expected):
                wrong.append(1)

    worker = threading.Thread(target=work)
    worker.start()
    for n in [1, 4, 2, 3] * 5:
        native.lib.set_num_threads(n)
    native.lib.set_num_threads(before)
    stop.set()
    worker.join()
    assert wrong == []


@needs_kernels
@needs_two_processors
def test_a_worker_stays_off_the_processor_that_its_caller_is_on():
    """Alone in a process of its own, whose one other thread is the worker."""
    code = """
import os, torch
from minivllm import envs
from minivllm.ops import activation, native
first, second = sorted(os.sched_getaffinity(0))[:2]
known = set(os.listdir("/proc/self/task"))
native.lib.set_num_threads(2)
x = torch.randn(64, 512)
activation.cpu(x)
(worker,) = set(os.listdir("/proc/self/task")) - known
def moved_to(processor):
    os.sched_setaffinity(0, {processor})
    os.sched_setaffinity(0, {first, second})  # it stays where it is, unless somebody else needs the place just now
    activation.cpu(x)
    return os.sched_getaffinity(int(worker)) == {first, second} - {processor}
for processor in (first, second, first):
    assert any(moved_to(processor) for _ in range(100)), processor
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@needs_kernels
def test_a_forked_child_makes_threads_of_its_own():
    code = """
import os, torch
from minivllm import envs
from minivllm.ops import activation, native
native.lib.set_num_threads(2)
x = torch.randn(64, 512)
expected = activation.cpu(x)
if (pid := os.fork()) == 0:
    os._exit(0 if torch.equal(activation.cpu(x), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_without_the_extension_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(native, "unavailable", "the native extension is not built: no such file")
    assert native.why_not(OpSpec("cpu", torch.float32)) == "the native extension is not built: no such file"
    assert activation.silu_mul.select(OpSpec("cpu", torch.float32)) is activation.reference


@needs_kernels
def test_another_device_or_dtype_is_left_to_the_reference():
    assert native.why_not(OpSpec("cuda", torch.float32)) == "needs a CPU, got cuda"
    assert native.why_not(OpSpec("cpu", torch.float64)) == "no torch.float64 kernel"
    assert native.why_not(OpSpec("cpu", torch.bfloat16)) is None
