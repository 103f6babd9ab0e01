"""A logits processor of the operator's own, in a real server: named on the command line, asked for by a request."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.e2e.server import serving

NAME = "tests.sample.processors:NthToken"


def test_a_request_reaches_a_processor_by_vllm_xargs_and_only_it(tiny_model: Path, short_path: Path):
    args = ["--served-model-name", "tiny", "--max-model-len", "256", "--kv-cache-memory-bytes", "16Mi"]
    with serving(tiny_model, *args, "--logits-processors", NAME, run_dir=short_path) as server:
        plain = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

        def ask(**changes) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json=plain | changes, timeout=60)

        forced = ask(vllm_xargs={"tokens": [40, 41, 42]}).json()["choices"][0]["token_ids"]
        free = ask().json()["choices"][0]["token_ids"]
        refused = ask(vllm_xargs={"tokens": "x"})
    assert forced == [40, 41, 42, 42] and free != forced
    assert refused.status_code == 400 and "NthToken: tokens must be a list" in refused.json()["error"]["message"]


def test_a_processor_that_cannot_be_imported_ends_the_start_with_its_reason(tiny_model: Path, short_path: Path):
    args = ["--logits-processors", "tests.sample.processors:Missing"]
    with serving(tiny_model, *args, run_dir=short_path, wait=False) as server:
        assert server.wait_exit(60) == 2
    assert "tests.sample.processors:Missing cannot be imported" in server.log[-1]
