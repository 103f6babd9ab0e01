"""What the README and the examples show is run as it stands; only addresses and the model's path are replaced."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.server import Server

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
LOCAL = "http://localhost:8000"


def _run(*arguments: str) -> str:
    """Run Python with our checkout importable; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _block(word: str) -> str:
    return next(block for block in BLOCKS if word in block)


def test_the_readme_has_a_block_for_the_client_and_one_for_a_script():
    assert len(BLOCKS) == 2


def test_the_readmes_client_streams_an_answer(server: Server):
    assert LOCAL in _block("OpenAI(")
    assert _run("-c", _block("OpenAI(").replace(LOCAL, server.url))


def test_the_readmes_script_generates(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(_block("LLM("))
    assert _run(str(script)).strip()


def test_the_client_example_completes_and_chats(server: Server):
    said = _run("examples/openai_client.py", f"{server.url}/v1")
    assert re.search(r"^completion: .+^chat: .+", said, re.M | re.S)


@pytest.mark.parametrize(
    ("name", "shown"), [("offline_inference", "chat -> "), ("async_generate", "second: ")]
)
def test_the_other_examples_generate(tiny_model: Path, name: str, shown: str):
    assert shown in _run(f"examples/{name}.py", str(tiny_model))


def test_every_file_the_readme_links_to_is_there():
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
