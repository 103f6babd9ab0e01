"""The page's logic, run by Node where there is one. The page in a browser: see check_playground.py."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import minivllm.entrypoints.openai.playground.files as files

LOGIC = Path(__file__).with_name("logic.mjs")


def test_the_pages_logic_holds(tmp_path: Path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("the page's own logic is not tested: there is no node; get it with: apt install nodejs")
    shutil.copytree(Path(files.__file__).parent / "static", tmp_path / "static")
    (tmp_path / "static" / "package.json").write_text('{"type": "module"}')  # as the page loads them
    done = subprocess.run([node, LOGIC, tmp_path / "static"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^ok: ", done.stdout, re.M)) == len(re.findall(r'^  (?:async )?"', LOGIC.read_text(), re.M))
