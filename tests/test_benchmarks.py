"""What the comparison with other engines promises: nothing stays behind, nothing is lost; and that scripts run."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

floors = pytest.importorskip("floors")
import compare  # noqa: E402
import first_token  # noqa: E402
from peers import Peer  # noqa: E402
from processes import Guard, Processes  # noqa: E402
from results import Results, as_table  # noqa: E402
from roofline import Roofline  # noqa: E402

# A parent that waits for two children, one of which left the session and the other ignores what it is asked.
FAMILY = "setsid sleep 61 & (trap '' TERM; sleep 62; sleep 63) & echo there; wait"
CONFIG = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
CONFIG |= {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 151936}  # Qwen3-0.6B
SHAPE = floors.ModelShape(*CONFIG.values())
RATES = {1: 0.03, 2048: 2.5}
ROOF = Roofline(2, "amx", 30.0, 20.0, RATES, RATES, RATES, {}, {1: 0.06, 2048: 4.0}, 5.0, 10.0)


def gone(pids: list[int], limit_s: float = 15) -> bool:
    end = time.monotonic() + limit_s
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_all_that_an_engine_starts_is_paused_and_ends_with_it(tmp_path: Path):
    engine = Processes(["bash", "-c", FAMILY], {}, tmp_path / "log", talks=True)
    assert engine.root.stdout.readline() == b"there\n"
    while len(engine.members()) < 4:
        time.sleep(0.02)
    members = engine.members()
    engine.pause()
    time.sleep(0.1)
    assert {process.status() for process in members} == {psutil.STATUS_STOPPED}
    engine.end()
    assert gone([process.pid for process in members])


STARTER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from processes import Guard, Processes
engine = Processes(["bash", "-c", "sleep 61 & sleep 62"], {}, Path(os.devnull), guard=Guard())
while len(engine.members()) < 3:
    pass
print(*(process.pid for process in engine.members()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_comparison_leaves_behind_is_ended_by_its_guard():
    done = subprocess.run([sys.executable, "-c", STARTER, str(BENCHMARKS)], capture_output=True, text=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3, done.stderr
    assert gone(pids)


def test_results_are_kept_line_by_line_and_a_failure_says_why(tmp_path: Path):
    run = {"kind": "run", "model": "/m", "cell": "T1", "seconds": 1.0}
    run |= {"requests": 8, "us_a_token": 5.0, "memory_mb": 9.0}
    results = Results(tmp_path / "r.jsonl")
    for rate in (100.0, 300.0, 200.0):
        results.add(**run, engine="ours", tokens_s=rate)
    results.add(**run | {"requests": 2}, engine="other", tokens_s=50.0)
    results.add(kind="failed", model="/m", cell="T1", engine="third", why="it ended with 1")
    again = Results(tmp_path / "r.jsonl")
    assert [line["tokens_s"] for line in again.of("/m", "T1", "ours")] == [100.0, 300.0, 200.0]
    first, rest = as_table(again).split("###")
    assert "| other | 50.0 of 2 requests (4.00 ×) |" in first
    rows = {row.split(" | ")[0]: row for row in rest.splitlines()}
    assert "| 200.0 | 100.0 to 300.0 |" in rows["| ours"]
    assert "| 4.00 × |" in rows["| other"] and "of 2 of the 8 requests" in rows["| other"]
    assert "it ended with 1" in rows["| third"]
    assert (tmp_path / "r.md").read_text() == as_table(again)


# offline.py --listen, in short; told to, it does not answer but ends.
ANSWERS = """
import json, sys
print(json.dumps({"ready": 0.1}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["work"] in sys.argv[1].split(","):
        sys.exit(3)
    print(json.dumps({"work": asked["work"], "seconds": 0.5, "tokens_s": 32.0}), flush=True)
"""


def test_an_engine_that_fails_gets_the_reason_in_its_row_and_the_others_go_on(tmp_path: Path, monkeypatch):
    def peer(name: str, command: list[str]) -> Peer:
        return Peer(name, None, [sys.executable, "-c", *command], stays=True)

    found = {
        "no-start": peer("no-start", ["raise SystemExit(7)"]),
        "no-json": peer("no-json", ["print('hello')"]),
        "no-w4": peer("no-w4", [ANSWERS, "W4"]),
        "good": peer("good", [ANSWERS, ""]),
    }
    monkeypatch.setattr(compare, "find_peers", lambda *_: found)
    monkeypatch.setattr(compare, "measure", lambda *_: ROOF)
    args = argparse.Namespace(peers=(), all_served=False, repeat=2, smoke=False, run_limit=20.0)
    results, model = Results(tmp_path / "r.jsonl"), tmp_path
    (model / "config.json").write_text(json.dumps(CONFIG))
    compare.Phase(args, results, Guard(), model, ["W3", "W4"], time.monotonic() + 60).run()

    def runs(engine: str) -> list[int]:
        return [len(results.of(str(model), cell, engine)) for cell in ("W3", "W4")]

    assert [runs(name) for name in found] == [[0, 0], [0, 0], [2, 0], [2, 2]]
    assert "ended with 7" in results.failure(str(model), "W4", "no-start")
    assert results.failure(str(model), "W3", "no-json")
    assert results.failure(str(model), "W3", "no-w4") is None
    assert "ended with 3" in results.failure(str(model), "W4", "no-w4")


@pytest.mark.parametrize("format", floors.FORMATS.values(), ids=floors.FORMATS)
@pytest.mark.parametrize("work", ["W1", "W2", "W3", "W4", "W5"])
def test_no_floor_lies_below_the_bound_of_reading_and_tile_products(work: str, format: floors.Format):
    floor, bound = (floors.Floor(SHAPE, ROOF, format, at_peak).seconds(work) for at_peak in (False, True))
    assert 0 < bound <= floor
    slower = replace(ROOF, bandwidth_gbs=15.0)
    assert floors.Floor(SHAPE, slower, format).seconds(work) > floor


def test_one_token_reads_each_weight_once_in_the_bytes_of_its_format():
    read = {name: 30e9 * floors.Floor(SHAPE, ROOF, format).step(1, 0) for name, format in floors.FORMATS.items()}
    assert read == pytest.approx({"bf16": 1.192e9, "int8": 0.596e9, "int4": 0.379e9}, rel=0.002)


SCRIPTS = "compare native_kernels attention gemm qkv roofline floors startup offline load first_token"


@pytest.mark.parametrize("script", SCRIPTS.split())
def test_a_script_says_what_it_is_for(script: str):
    command = [sys.executable, f"{script}.py", "--help"]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and len(done.stdout) > 200, done.stderr


def test_all_that_a_first_token_is_timed_by_is_there():
    for _, module, function, _ in first_token.MARKS:
        assert callable(attrgetter(function)(import_module(module)))


def test_a_comparison_is_refused_where_a_source_tree_without_kernels_would_be_measured(
    tmp_path, monkeypatch, capsys
):
    tree, python = tmp_path / "minivllm" / "utils", tmp_path / "python"
    tree.mkdir(parents=True)
    (tree / "native.py").write_text("unavailable = 'the native extension is not built'\n")
    (tmp_path / "minivllm" / "__init__.py").touch()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # as where nothing is installed in its place
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--model", str(tmp_path), "--peers", "ours"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "the native extension is not built; build it" in capsys.readouterr().err
