"""A light load on any OpenAI-compatible server: raw sockets, one thread, a few microseconds a token.

    python benchmarks/load.py --port 8000 --work W5 [--repeat 3] [--json]

The generator shares the processors with the server it measures, so it prints what it took of them. Prompts are random
token ids, new ones for every request (no prefix cache helps); greedy; end of sequence ignored. It counts events: a
server that puts two tokens into one event shows one gap for both; tokens are those of the server's own `usage`.

What the loads are: works.py.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import select
import socket
import statistics
import time
import urllib.request
from dataclasses import asdict, dataclass, field

from works import MIXED, WORKS, Work

LOADS = WORKS | {"mixed": MIXED}
EVENT = b"data: {"
TAIL = 2048
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True)
class Result:
    tokens_s: float
    first_ms_p50: float
    first_ms_p99: float
    inter_ms_p50: float
    inter_ms_p99: float
    requests: int
    tokens: int
    seconds: float
    own_us_a_token: float
    own_cpu_share: float  # of one processor


@dataclass
class _Stream:
    """One request on its connection."""

    connection: socket.socket
    begun: float
    cut: bytes = b""  # the last bytes, so that a mark cut in two is found
    tail: bytes = b""  # the last events: the usage stands there
    times: list[float] = field(default_factory=list)  # of every event


def served_model(host: str, port: int) -> str:
    with urllib.request.urlopen(f"http://{host}:{port}/v1/models") as answer:
        return json.load(answer)["data"][0]["id"]


class Load:
    def __init__(self, host: str, port: int, model: str, vocab_size: int, seed: int = 0) -> None:
        self._address, self._model, self._vocab_size = (host, port), model, vocab_size
        self._pick = random.Random(seed)

    def run(self, work: Work, limit_s: float = 3600.0) -> Result:
        """Send all of it and wait for the last answer.

        Raises:
            RuntimeError: an answer is not whole, or `limit_s` have passed.
        """
        prompts = work.prompts(self._vocab_size, self._pick)
        bodies = [self._request(prompt, work.num_out) for prompt in reversed(prompts)]
        poll = select.epoll()
        streams: dict[int, _Stream] = {}
        done: list[_Stream] = []
        began, cpu = time.perf_counter(), time.process_time()
        while bodies and len(streams) < work.streams:
            self._open(bodies.pop(), streams, poll)
        now = time.perf_counter
        while streams:
            if (left := began + limit_s - now()) <= 0:
                raise RuntimeError(_too_slow(done, streams, limit_s))
            for fd, _ in poll.poll(left):
                stream = streams[fd]
                data = stream.connection.recv(65536)
                if not data:
                    poll.unregister(fd)
                    stream.connection.close()
                    done.append(streams.pop(fd))
                    if bodies:
                        self._open(bodies.pop(), streams, poll)
                    continue
                count = (stream.cut + data).count(EVENT)
                stream.cut = data[1 - len(EVENT) :]
                if count:
                    stream.times += [now()] * count
                stream.tail = (stream.tail + data)[-TAIL:]
        seconds, cpu = now() - began, time.process_time() - cpu
        poll.close()
        return _result(done, work, seconds, cpu)

    def _request(self, prompt: list[int], num_out: int) -> bytes:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_out,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._address[0]}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def _open(self, request: bytes, streams: dict[int, _Stream], poll: select.epoll) -> None:
        begun = time.perf_counter()
        connection = socket.create_connection(self._address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request)
        streams[connection.fileno()] = _Stream(connection, begun)
        poll.register(connection.fileno(), select.EPOLLIN)


def _too_slow(done: list[_Stream], streams: dict[int, _Stream], limit_s: float) -> str:
    for stream in streams.values():
        stream.connection.close()
    events = sum(len(stream.times) for stream in [*done, *streams.values()])
    return f"not done in {limit_s:.0f} s: {len(done)} answers whole, {len(streams)} begun, {events} tokens"


def _result(streams: list[_Stream], work: Work, seconds: float, cpu: float) -> Result:
    """Raises RuntimeError when an answer is not whole."""
    tokens = 0
    for stream in streams:
        usage = USAGE.findall(stream.tail)
        if not usage or int(usage[-1]) != work.num_out:
            raise RuntimeError(
                f"an answer has {len(stream.times)} events and usage {usage}, not {work.num_out} tokens: "
                f"{stream.tail[-300:]!r}"
            )
        tokens += int(usage[-1])
    first = [1e3 * (stream.times[0] - stream.begun) for stream in streams]
    # The events behind the last token are a finish and the usage.
    gaps = [1e3 * (b - a) for stream in streams for a, b in zip(stream.times, stream.times[1 : work.num_out])]
    return Result(
        tokens_s=tokens / seconds,
        first_ms_p50=_quantile(first, 0.5),
        first_ms_p99=_quantile(first, 0.99),
        inter_ms_p50=_quantile(gaps, 0.5),
        inter_ms_p99=_quantile(gaps, 0.99),
        requests=len(streams),
        tokens=tokens,
        seconds=seconds,
        own_us_a_token=1e6 * cpu / tokens,
        own_cpu_share=cpu / seconds,
    )


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(results: list[Result]) -> Result:
    """Of each number by itself."""
    rows = [asdict(result) for result in results]
    return Result(**{name: statistics.median(row[name] for row in rows) for name in rows[0]})


def describe(result: Result) -> str:
    return (
        f"{result.tokens_s:9.1f} tok/s   first p50/p99 {result.first_ms_p50:.1f}/{result.first_ms_p99:.1f} ms   "
        f"inter p50/p99 {result.inter_ms_p50:.2f}/{result.inter_ms_p99:.2f} ms   "
        f"µs of processor a token: generator {result.own_us_a_token:.1f} ({100 * result.own_cpu_share:.0f}% of one)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--work", choices=LOADS, required=True)
    parser.add_argument("--vocab-size", type=int, default=32000, help="prompts use ids below it")
    parser.add_argument("--repeat", type=int, default=3, help="the median is told")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load = Load(args.host, args.port, served_model(args.host, args.port), args.vocab_size, seed=time.time_ns())
    load.run(Work(1, 1, 16, 16))  # the first request of a server is slow
    result = median([load.run(LOADS[args.work]) for _ in range(args.repeat)])
    print(json.dumps(asdict(result)) if args.json else describe(result))


if __name__ == "__main__":
    main()
