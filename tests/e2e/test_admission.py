"""A server that takes no more than it was told to."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.e2e.server import serving

ENDLESS = {"model": "tiny", "prompt": "go", "max_tokens": 30_000, "ignore_eos": True, "stream": True}
SHORT = {"model": "tiny", "prompt": "go", "max_tokens": 2}


def test_one_request_too_many_is_a_503_and_room_is_found_again(tiny_model: Path, short_path: Path):
    args = ["--served-model-name", "tiny", "--max-model-len", "32768", "--kv-cache-memory-bytes", "256Mi"]
    args += ["--hf-overrides", '{"max_position_embeddings": 32768}', "--max-num-queued-reqs", "2"]
    with serving(tiny_model, *args, run_dir=short_path) as server:
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=ENDLESS, timeout=60) as stream:
            lines = stream.iter_lines()  # kept: when it goes, the connection is closed
            next(lines)
            assert httpx.post(url, json=SHORT, timeout=60).status_code == 200
            refused = httpx.post(url, json={**SHORT, "n": 2, "temperature": 1}, timeout=60)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "ServiceUnavailableError"
            assert "--max-num-queued-reqs allows 2" in refused.json()["error"]["message"]
        for _ in range(100):  # until the server has noticed that the stream is gone
            answer = httpx.post(url, json={**SHORT, "n": 2, "temperature": 1}, timeout=60)
            if answer.status_code == 200:
                break
        assert answer.status_code == 200
        counted = 'vllm:admission_rejections_total{model_name="tiny",reason="max_num_queued_reqs"}'
        assert counted in httpx.get(f"{server.url}/metrics", timeout=60).text
