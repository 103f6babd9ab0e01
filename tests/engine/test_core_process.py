"""The child process as such: it does not run the user's script again, outlives nobody, and leaves nothing."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from minivllm.engine.core_launcher import CoreProcess
from minivllm.engine.core_process import _CoreProcess
from minivllm.engine.llm_engine import LLMEngine
from minivllm.exceptions import ConfigError, EngineDeadError, EngineStartError, ModelFilesError
from minivllm.messages.codec import Decoder
from minivllm.messages.engine import CoreToClient, EngineCoreReady
from minivllm.sampling_params import SamplingParams
from minivllm.utils.process import spawn, unblock_interrupts
from minivllm.utils.sockets import MAX_UNIX_PATH, RunDirectory
from tests.engine.engines import make_config

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys, time
print("script runs", flush=True)
from minivllm.engine.core_process import _CoreProcess
from minivllm.engine.llm_engine import LLMEngine
from minivllm.sampling_params import SamplingParams
from tests.engine.engines import make_config
engine = LLMEngine.from_engine_config(make_config(max_model_len=50_000))
print(engine.engine_core.core_pid, flush=True)
{then}
"""
GENERATE = """
engine.add_request("a", [1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
while engine.has_unfinished_requests():
    for output in engine.step():
        print(len(output.outputs[0].token_ids), flush=True)
"""

ENDLESS = """
engine.add_request("a", [1], SamplingParams(max_tokens=None, ignore_eos=True))
while True:
    engine.step()
"""


def start_script(path: Path, then: str) -> tuple[subprocess.Popen, int]:
    """A script without a main guard that builds an engine; the core's pid once it serves."""
    path.write_text(SCRIPT.format(then=then))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "script runs\n"
    return process, int(process.stdout.readline())


def wait_gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_script_without_a_main_guard_runs_once_and_leaves_nothing(tmp_path, run_dir):
    process, core_pid = start_script(tmp_path / "script.py", GENERATE)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert rest == "1\n2\n3\n"
    assert wait_gone(core_pid)


def test_a_core_gets_ready_while_nobody_listens(run_dir):
    """Who started it reads a tokenizer meanwhile: a core that asked for something first would stand still as long."""
    core, decode, heard = CoreProcess(make_config(), on_death=lambda cause: None), Decoder(CoreToClient), []
    while not heard or not isinstance(heard[-1], EngineCoreReady):
        assert core.input_socket.poll(60_000)
        heard.append(decode(core.input_socket.recv_multipart()[1]))
    core.shutdown()


def test_a_core_that_cannot_start_ends_by_itself_with_its_error_s_code(run_dir):
    deaths: list[str] = []
    core = CoreProcess(make_config("tests.engine.engines:SlowlyEndingExecutor"), on_death=deaths.append)
    with pytest.raises(EngineStartError, match="download the checkpoint again"):
        core.wait_ready()
    assert (core.exitcode, deaths) == (ModelFilesError.exit_code, [])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", [False, True])
def test_the_core_goes_with_its_parent_however_that_ends(tmp_path, run_dir, how, busy):
    process, core_pid = start_script(tmp_path / "script.py", ENDLESS if busy else "time.sleep(60)")
    process.send_signal(how)
    process.wait(60)
    assert wait_gone(core_pid)


def test_ctrl_c_while_the_child_starts_python_does_not_break_it():
    process = spawn(end_unless_interrupted, (), name="child")
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 0


def end_unless_interrupted() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    unblock_interrupts()


def test_ctrl_c_on_the_whole_group_is_left_to_the_parent(run_dir):
    engine = LLMEngine.from_engine_config(make_config())
    os.kill(engine.engine_core.core_pid, signal.SIGINT)
    engine.add_request("a", [1], SamplingParams(max_tokens=3, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    engine.shutdown()


def test_a_killed_core_raises_in_step(run_dir):
    engine = LLMEngine.from_engine_config(make_config(max_model_len=50_000))
    engine.add_request("a", [1], SamplingParams(max_tokens=None, ignore_eos=True))
    engine.step()
    os.kill(engine.engine_core.core_pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        while True:
            engine.step()
    engine.shutdown()


def test_a_stopped_core_is_killed_in_the_end(run_dir):
    engine = LLMEngine.from_engine_config(make_config())
    os.kill(engine.engine_core.core_pid, signal.SIGSTOP)
    engine.shutdown()
    assert not psutil.pid_exists(engine.engine_core.core_pid)


def test_both_places_give_the_same_tokens(run_dir):
    def answers(in_process: bool) -> dict[str, list[int]]:
        engine = LLMEngine.from_engine_config(make_config(), in_process=in_process)
        for i in range(5):
            engine.add_request(f"r{i}", [1, 2, i], SamplingParams(max_tokens=4, ignore_eos=True, seed=i))
        finished = {}
        while engine.has_unfinished_requests():
            finished |= {output.request_id: output for output in engine.step() if output.finished}
        assert engine.reset_prefix_cache()
        engine.shutdown()
        engine.shutdown()
        return {request_id: output.outputs[0].token_ids for request_id, output in finished.items()}

    in_process = answers(True)
    assert answers(False) == in_process
    assert sorted(in_process) == [f"r{i}" for i in range(5)] and all(len(t) == 4 for t in in_process.values())


def test_aborted_requests_give_no_output(run_dir):
    engine = LLMEngine.from_engine_config(make_config())
    engine.add_request("a", [1], SamplingParams(max_tokens=None, ignore_eos=True, n=2))
    engine.abort_request("a")
    assert not engine.has_unfinished_requests() and engine.step() == []
    engine.shutdown()


def test_the_run_directory_is_private_and_only_those_without_an_owner_are_swept(run_dir):
    # Whether an owner lives is asked of the lock: its pid may be of another namespace, or taken anew.
    stale, strange = run_dir / f"minivllm-{os.getpid()}-0123abcd", run_dir / "minivllm-notours"
    stale.mkdir()
    (stale / "lock").touch()
    strange.mkdir()
    first = RunDirectory()
    first.path.rename(first.path.with_name("minivllm-999999999-0123abcd"))  # alive, though no such pid is seen here
    first.path = first.path.with_name("minivllm-999999999-0123abcd")
    mine = RunDirectory()
    assert mine.path.stat().st_mode & 0o777 == 0o700
    assert sorted(run_dir.iterdir()) == sorted([first.path, mine.path, strange])
    for directory in (first, mine, mine):
        directory.remove()
    strange.rmdir()


def test_a_core_that_cannot_connect_is_a_failed_start(run_dir, monkeypatch):
    def spawn_after_cleaning(*args, **kwargs):
        for path in run_dir.iterdir():
            shutil.rmtree(path)
        return spawn(*args, **kwargs)

    monkeypatch.setattr("minivllm.engine.core_launcher.spawn", spawn_after_cleaning)
    with pytest.raises(EngineStartError, match="MINIVLLM_RUN_DIR"):
        LLMEngine.from_engine_config(make_config(), in_process=False)


def test_a_run_directory_too_long_for_sockets_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIVLLM_RUN_DIR", str(tmp_path / ("x" * 100)))
    directory = RunDirectory()
    assert len(os.fsencode(directory.path / "in")) <= MAX_UNIX_PATH
    directory.remove()


def test_a_run_directory_that_cannot_be_made_is_a_config_error(monkeypatch, short_path):
    (short_path / "file").touch()
    monkeypatch.setenv("MINIVLLM_RUN_DIR", str(short_path / "file"))
    with pytest.raises(ConfigError, match="MINIVLLM_RUN_DIR"):
        RunDirectory()


def test_a_core_with_nothing_to_do_hears_of_it_once_and_nothing_that_comes_waits_for_that(monkeypatch):
    monkeypatch.setattr("minivllm.engine.core_process._IDLE_S", 0.05)
    process, idle = object.__new__(_CoreProcess), []  # without its sockets: only what waits for inputs
    process._inputs, process._has_idled = queue.SimpleQueue(), False
    process._core = SimpleNamespace(on_idle=lambda: (idle.append(1), process._inputs.put("later")))
    process._inputs.put("at once")
    assert process._next_input() == "at once" and not idle
    assert process._next_input() == "later" and idle == [1]
    threading.Timer(0.2, process._inputs.put, ["last"]).start()
    assert process._next_input() == "last" and idle == [1]
