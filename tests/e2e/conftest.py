"""Servers for all tests that only ask them things; those that break one start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.e2e.server import Server, serving


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    args = ["--served-model-name", "tiny", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64Mi"]
    with serving(tiny_model, *args, run_dir=tmp_path_factory.mktemp("run")) as server:
        yield server


@pytest.fixture(scope="session")
def box_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It serves the model in the box, none being named."""
    with serving(None, "--kv-cache-memory-bytes", "64Mi", run_dir=tmp_path_factory.mktemp("run")) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
