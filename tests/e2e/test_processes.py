"""What the processes are made of: the API server never loads torch and stays small."""

from __future__ import annotations

import psutil

from tests.e2e.server import Server

MEGABYTE = 1_000_000


def test_the_api_server_has_no_torch_and_stays_below_150_mb(server: Server, client):
    for _ in range(3):
        client.completions.create(model="tiny", prompt="hello", max_tokens=8)
    api = psutil.Process(server.process.pid)
    assert not any("torch" in mapping.path for mapping in api.memory_maps())
    assert api.memory_info().rss < 150 * MEGABYTE
    assert any("libtorch" in mapping.path for mapping in server.core.memory_maps())


def test_the_socket_directory_is_private(server: Server):
    directories = [path for path in server.run_dir.iterdir() if path.is_dir()]
    assert len(directories) == 1
    assert directories[0].stat().st_mode & 0o777 == 0o700
