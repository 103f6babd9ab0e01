"""An OpenAI server of canned answers, for the programs that talk to one. Remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "canned"
# What is not streamed, by path.
_ANSWERS = {
    "/detokenize": {"prompt": "some words"},
    "/start_profile": {"status": "profiling"},
    "/stop_profile": {"status": "stopped", "files": ["/there/trace.json"]},
}


class StubServer(ThreadingHTTPServer):
    """`words` are streamed as the answer; `refusal` (status, message) is given instead, `broken` ends it early.

    `statuses` are those of the next looks at the models, before there is an answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.words = ["Bon", "jour", "."]
        self.refusal: tuple[int, str] | None = None
        self.broken = False
        self.statuses: list[int] = []
        self.error: str | None = None
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: StubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.server.statuses:
            self._send_json({}, self.server.statuses.pop(0))
            return
        self._send_json({"data": [{"id": MODEL, "root": "/nowhere"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        self.server.asked.append(body)
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.server.paths.append(self.path)
        if (answer := _ANSWERS.get(self.path)) is not None:
            self._send_json(answer)
            return
        if self.server.refusal is not None:
            status, message = self.server.refusal
            self._send_json({"error": {"message": message, "code": status}}, status)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chat = self.path.endswith("chat/completions")
        if chat:
            self._chunk(b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n')
        for word in self.server.words:
            self._event({"choices": [{"index": 0, **({"delta": {"content": word}} if chat else {"text": word})}]})
        if self.server.error is not None:
            self._event({"error": {"message": self.server.error, "code": 500}})
        elif not self.server.broken:
            self._event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": len(self.server.words)}})
        if not self.server.broken:
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, value: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _send_json(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def stub_server() -> Iterator[StubServer]:
    with StubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
