"""A run directory that must be empty in the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def run_dir(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the engines of this test put their sockets; nothing may be left there."""
    monkeypatch.setenv("MINIVLLM_RUN_DIR", str(short_path))
    yield short_path
    assert list(short_path.iterdir()) == []
