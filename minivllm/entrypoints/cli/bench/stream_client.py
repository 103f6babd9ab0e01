"""One streamed completion over a raw socket: as little Python per token as can be, so that a load generator that
shares the machine with the server measures the server.

Speaks just enough HTTP/1.1: one POST a connection, a chunked, sized or closing body, events split on blank lines.
Only the events that matter (usage, errors) are parsed.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from minivllm.exceptions import ConfigError

READ_SIZE = 1 << 16
MAX_HEADER_BYTES = 1 << 16


@dataclass
class Answer:
    """What one request brought; times are seconds, `start` on the clock of time.perf_counter."""

    prompt_len: int
    start: float = 0.0
    first_token_s: float = 0.0
    latency_s: float = 0.0
    inter_token_s: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time of the tokens after the first; None if there are none."""
        if self.num_output_tokens < 2:
            return None
        return (self.latency_s - self.first_token_s) / (self.num_output_tokens - 1)


class Endpoint:
    """Where requests go: a URL taken apart once, and the headers that each repeats.

    id_prefix: with it every request has an X-Request-Id, this and its number. insecure: take any certificate.
    """

    def __init__(self, url: str, headers: dict[str, str], *, id_prefix: str = "", insecure: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url} is no http URL, such as http://127.0.0.1:8000")
        self.host = parts.hostname
        self.tls: ssl.SSLContext | bool = parts.scheme == "https"
        if self.tls and insecure:
            self.tls = ssl._create_unverified_context()
        self.port = parts.port or (443 if self.tls else 80)
        lines = [
            f"POST {parts.path or '/'}{'?' + parts.query if parts.query else ''} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "Content-Type: application/json",
            "Connection: close",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self._id_prefix, self._num_requests = id_prefix, 0
        if any("\n" in line or "\r" in line for line in [*lines, id_prefix]):
            raise ConfigError("a header must not contain a line break")
        self._head = "\r\n".join(lines)

    def request(self, body: bytes) -> bytes:
        head = f"{self._head}\r\nContent-Length: {len(body)}"
        if self._id_prefix:
            head += f"\r\nX-Request-Id: {self._id_prefix}{self._num_requests}"
            self._num_requests += 1
        return f"{head}\r\n\r\n".encode() + body


async def ask(endpoint: Endpoint, body: bytes, prompt_len: int) -> Answer:
    """Send a streaming request and time its events. Failures are told in `error`, never raised."""
    answer = Answer(prompt_len, start=time.perf_counter())
    try:
        reader, writer = await asyncio.open_connection(
            endpoint.host, endpoint.port, ssl=endpoint.tls or None, limit=MAX_HEADER_BYTES
        )
        try:
            writer.write(endpoint.request(body))
            await writer.drain()
            await _read_answer(reader, answer)
        finally:
            writer.close()
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def _read_answer(reader: asyncio.StreamReader, answer: Answer) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(None, 2)[1])
    chunked = b"transfer-encoding: chunked" in head.lower()
    if status != 200:
        text = await reader.read(2000)
        answer.error = f"HTTP {status}: {text.decode(errors='replace')}"
        return
    unchunk = _Unchunker() if chunked else None
    events = b""
    while data := await reader.read(READ_SIZE):
        now = time.perf_counter()
        events += unchunk.feed(data) if unchunk else data
        *complete, events = events.split(b"\n\n")
        for event in complete:
            if _take(event, now, answer):
                return
    if answer.error is None:
        answer.error = "the stream ended before [DONE]"


def _take(event: bytes, now: float, answer: Answer) -> bool:
    """Account for one event; whether it was the last."""
    event = event.strip()
    if not event.startswith(b"data:"):
        return False  # a comment that keeps the connection open
    if event.endswith(b"[DONE]"):
        if answer.num_output_tokens == 0 and answer.error is None:
            answer.error = "no usage came; the server must support stream_options.include_usage"
        return True
    if b'"choices":[]' in event or b'"choices": []' in event or event.startswith((b'data: {"error"', b'data:{"error"')):
        _take_last_words(json.loads(event[5:]), answer)
        return False
    if b'"role"' in event and b'"content":""' in event:
        return False  # a chat begins with the role of who answers, before there is a token
    elapsed = now - answer.start
    if answer.first_token_s == 0.0:
        answer.first_token_s = elapsed
    else:
        answer.inter_token_s.append(elapsed - answer.latency_s)
    answer.latency_s = elapsed
    return False


def _take_last_words(event: dict, answer: Answer) -> None:
    if "error" in event:
        error = event["error"]
        answer.error = str(error.get("message", error) if isinstance(error, dict) else error)
    elif event.get("usage"):
        answer.num_output_tokens = event["usage"]["completion_tokens"]
        answer.prompt_len = event["usage"].get("prompt_tokens", answer.prompt_len)


class _Unchunker:
    """Takes the framing off a chunked body, fed in any pieces."""

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0  # bytes of the current chunk still to come
        self._skip = 0  # of the line break behind it

    def feed(self, data: bytes) -> bytes:
        buffer, out, at = self._buffer + data, [], 0
        while at < len(buffer):
            if self._skip:
                step = min(self._skip, len(buffer) - at)
                self._skip -= step
                at += step
            elif self._left:
                step = min(self._left, len(buffer) - at)
                out.append(buffer[at : at + step])
                self._left -= step
                at += step
                self._skip = 0 if self._left else 2
            else:
                end = buffer.find(b"\r\n", at)
                if end < 0:
                    break
                self._left = int(buffer[at:end].split(b";")[0], 16)
                at = end + 2
                self._skip = 0 if self._left else 2  # the last chunk is empty
        self._buffer = buffer[at:]
        return b"".join(out)
