"""`python -m tests.gpu` without a GPU: what it would do, in which order, and that it ends in time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tests.gpu.interpreter  # noqa: F401  before the kernels
from tests.gpu.__main__ import OUT_OF_TIME, Row, Task, all_cases, all_checks, all_tasks, run_all
from tests.gpu.cases import cuda
from tests.gpu.engine import CHECKS

ROOT = Path(__file__).resolve().parents[2]


def test_it_checks_nothing_without_a_card_says_so_and_can_say_what_it_would():
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--list", "--only", "attention_decode", "engine_server"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "NOTHING WAS CHECKED: torch" in done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0][1:] == ["large"] and lines[1] == ["engine_server"] and len(lines) > 5


def test_one_case_of_each_kind_comes_first_then_the_engine_and_nothing_is_left_out():
    tasks = all_tasks(("",), False, CHECKS)
    names = [task.name for task in tasks]
    engine = [name for name in names if name.startswith("engine_")]
    num_first = names.index(engine[0])
    assert names[num_first : num_first + len(engine)] == engine == list(CHECKS)
    firsts = {"_".join(name.split("_")[:2]) for name in names[:num_first]}
    assert len(firsts) == num_first and {"attention_decode", "linear_fp8", "kv_write"} <= firsts
    assert sorted((task.name, task.size) for task in tasks if task.size) == sorted(
        (name, size) for name in all_cases() for size in ("small", "large")
    )
    assert {task.size for task in all_tasks(("",), True, ())} == {"small"}


def test_what_is_not_built_is_not_said_to_be_good(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    assert all_checks() == list(CHECKS)
    monkeypatch.setattr(cuda, "why_not", lambda: "built without CUDA kernels")
    assert set(CHECKS) - set(all_checks()) == {"engine_cuda_decode_against_triton"}


def test_what_would_begin_too_late_is_not_run_and_is_no_success(capsys: pytest.CaptureFixture[str]):
    times = iter([0.0, 5.0, 11.0, 12.0])
    tasks = [Task(f"case {i}", "small", lambda i=i: Row(f"case {i}", 0.0, 1.0, 0.1)) for i in range(4)]
    rows = run_all(tasks, 10.0, lambda: next(times))
    assert [row.is_good for row in rows] == [True, True, False, False]
    assert [row.error for row in rows[2:]] == [OUT_OF_TIME] * 2
    assert capsys.readouterr().out.count(OUT_OF_TIME) == 2
