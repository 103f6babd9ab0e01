"""A run directory that must be empty in the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the engines of this test put their sockets; nothing may be left there."""
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setenv("MINIVLLM_RUN_DIR", str(directory))
    yield directory
    assert list(directory.iterdir()) == []
