"""The plain /generate server: whole answers, lines as they grow, and its ways to end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from minivllm.entrypoints.api_server import build_app, main, make_arg_parser
from minivllm.exceptions import EngineDeadError, QueueFullError, RequestError
from minivllm.outputs import CompletionOutput, RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams


class GrowingEngine:
    """Answers every prompt with " one two three", a word an output; stops for ever after `stuck_after` of them."""

    def __init__(self) -> None:
        self.params: SamplingParams | None = None
        self.failure: Exception | None = None
        self.stuck_after = 3
        self.num_open = 0
        self.max_num_requests = 8

    async def check_health(self) -> None:
        pass

    def check_admission(self, num_requests: int = 1) -> None:
        if num_requests > self.max_num_requests:
            raise QueueFullError("the server is busy: 0 requests are open", reason="max_num_queued_reqs")

    async def generate(self, prompt: Any, params: SamplingParams, request_id: str) -> AsyncGenerator[RequestOutput]:
        if prompt == "":
            raise RequestError("the prompt is empty", param="prompt")
        self.params = params
        self.num_open += 1
        try:
            words = [" one", " two", " three"]
            for count in range(1, 4):
                if count > self.stuck_after:
                    await asyncio.Event().wait()
                if self.failure is not None and count == 3:
                    raise self.failure
                last = count == 3
                if last or params.output_kind is RequestOutputKind.CUMULATIVE:
                    text = "".join(words[:count])
                    reason = "stop" if last else None
                    answers = [CompletionOutput(i, text, [], finish_reason=reason) for i in range(params.n)]
                    yield RequestOutput(request_id, prompt, [], answers, last)
        finally:
            self.num_open -= 1


def post(engine: GrowingEngine, content: Any, **headers: str) -> httpx.Response:
    async def talk() -> httpx.Response:
        transport = httpx.ASGITransport(build_app(engine), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            text = json.dumps(content) if isinstance(content, (dict, list)) else content
            return await client.post(
                "/generate", content=text, headers={"content-type": "application/json", **headers}
            )

    return asyncio.run(talk())


def test_the_whole_answer_follows_the_prompt():
    engine = GrowingEngine()
    response = post(engine, {"prompt": "Count:", "n": 2, "temperature": 0.5, "max_tokens": 9})
    assert response.json() == {"text": ["Count: one two three"] * 2}
    assert (engine.params.temperature, engine.params.max_tokens) == (0.5, 9)
    assert engine.num_open == 0


def test_biases_are_keyed_by_token_ids_as_json_spells_them():
    engine = GrowingEngine()
    assert post(engine, {"prompt": "x", "logit_bias": {"1": 5}}).status_code == 200
    assert engine.params.logit_bias == {1: 5.0}


def test_a_body_may_come_in_pieces():
    async def pieces() -> AsyncGenerator[bytes]:
        for piece in (b'{"prompt": ', b'"Count:", ', b'"n": 2', b"}"):
            await asyncio.sleep(0)  # as over a network: who listens to the connection must not take one
            yield piece

    assert post(GrowingEngine(), pieces()).json() == {"text": ["Count: one two three"] * 2}


def test_a_stream_is_lines_that_grow():
    response = post(GrowingEngine(), {"prompt": "Count:", "stream": True})
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines == [{"text": [f"Count:{words}"]} for words in (" one", " one two", " one two three")]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ("[" * 100_000, "not JSON"),
        ({}, "no prompt"),
        ({"prompt": ["a", "b"]}, "one text or one list of token ids"),
        ({"prompt": [[1], [2]]}, "one text or one list of token ids"),
        ({"prompt": "x", "logit_bias": {"x": 5}}, "logit_bias"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "", "stream": True}, "the prompt is empty"),
        ({"prompt": "x", "stream": "yes"}, "stream"),
        ({"prompt": "x", "max_tokenz": 1}, "did you mean 'max_tokens'"),
        ({"prompt": "x", "temperature": 9}, "temperature must be"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ],
)
def test_a_wrong_request_is_answered_with_the_reason(body: Any, reason: str):
    response = post(GrowingEngine(), body)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_a_body_that_does_not_say_it_is_json_is_refused():
    assert post(GrowingEngine(), {"prompt": "x"}, **{"content-type": "text/plain"}).status_code == 400


def test_an_engine_that_dies_is_a_500_or_the_last_line():
    engine = GrowingEngine()
    engine.failure = EngineDeadError()
    assert post(engine, {"prompt": "x"}).status_code == 500
    lines = post(engine, {"prompt": "x", "stream": True}).text.splitlines()
    assert len(lines) == 3
    assert "died" in json.loads(lines[-1])["error"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_work(stream: bool):
    engine = GrowingEngine()
    engine.stuck_after = 2
    app = build_app(engine)

    async def leave() -> None:
        body = json.dumps({"prompt": "x", "stream": stream}).encode()
        request = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()
        scope = {
            "type": "http", "method": "POST", "path": "/generate", "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip

        async def receive() -> dict:
            if request:
                return request.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            pass

        call = asyncio.ensure_future(app(scope, receive, send))
        while engine.num_open == 0:
            await asyncio.sleep(0)
        left.set()
        await asyncio.wait_for(call, 30)

    asyncio.run(leave())
    assert engine.num_open == 0


def test_a_server_that_stops_ends_its_streams_with_an_error_line():
    engine = GrowingEngine()
    engine.stuck_after = 2
    app = build_app(engine)

    async def stop() -> list[dict]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            call = asyncio.ensure_future(client.post("/generate", json={"prompt": "x", "stream": True}))
            while engine.num_open == 0:
                await asyncio.sleep(0)
            app.state.lifecycle.close()
            return [json.loads(line) for line in (await call).text.splitlines()]

    assert "shutting down" in asyncio.run(stop())[-1]["error"]
    assert engine.num_open == 0


def test_its_options_are_the_engines_and_an_address():
    args = make_arg_parser().parse_args(["--model", "m", "--port", "1", "--max-num-seqs", "3"])
    assert (args.model, args.port, args.max_num_seqs) == ("m", 1, 3)


def test_a_full_queue_is_a_503():
    engine = GrowingEngine()
    engine.max_num_requests = 1
    response = post(engine, {"prompt": "x", "n": 2})
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "ServiceUnavailableError"


def test_traces_are_refused_for_it_sends_none(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["--model", "nowhere", "--otlp-traces-endpoint", "http://127.0.0.1:4317"])
    assert ended.value.code == 2
    assert "only the OpenAI server sends traces" in capsys.readouterr().err
