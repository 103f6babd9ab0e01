"""The examples of clients: those whose client the tests have are run, and the table names every one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.server import serving

CLIENTS = Path(__file__).resolve().parents[2] / "examples" / "clients"
ARGUMENTS = (
    "--api-key example --enable-auto-tool-choice --tool-call-parser hermes --max-num-queued-reqs 8 "
    "--enable-tokenizer-info-endpoint"
).split()


def test_openais_client_does_all_that_its_example_shows(short_path: Path):
    with serving(None, *ARGUMENTS, "--kv-cache-memory-bytes", "64Mi", run_dir=short_path) as server:
        command = [sys.executable, str(CLIENTS / "openai_python.py")]
        environment = {**os.environ, "BASE_URL": f"{server.url}/v1", "KEY": "example"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(r"^(\w+): ", done.stdout, re.M)
    assert len(steps) == 12 and steps[-1] == "too_many_at_once"


def test_the_table_has_a_row_for_each_and_the_server_that_they_expect():
    text = (CLIENTS / "README.md").read_text()
    files = {path.name for path in CLIENTS.iterdir() if path.suffix in (".py", ".mjs")} | {"lm_eval/run.sh"}
    assert set(re.findall(r"^\|.*?\| `([\w/]+\.\w+)` \|", text, re.M)) == files
    for argument in ARGUMENTS:
        assert argument in text
