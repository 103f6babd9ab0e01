"""What a token costs the server around the model: microseconds of processor time in each process, without a model.

    python benchmarks/front.py --model DIR [--streams 64 256] [--chat] [--repeat 3] [--step-ms 4]

The server is the real one, scheduler and sockets included; only its executor gives tokens drawn at random, a step of
at least --step-ms at a time. The load is load.py's, 128 tokens in and 128 out, its clients beside it on the same
processors. DIR is read for its tokenizer and its sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from minivllm.executor.abstract import Executor
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput, WorkerReady

STEP_MS = "FRONT_STEP_MS"
BLOCK_SIZE, NUM_BLOCKS = 128, 4096


class NoModel(Executor):
    """Any tokens, for every request whose prompt is through. For `--distributed-executor-backend front:NoModel`."""

    def initialize(self) -> WorkerReady:
        self._step_s = float(os.environ[STEP_MS]) / 1e3
        self._pick = random.Random(0)
        self._vocab_size = self.config.hf_config.vocab_size
        self._missing: dict[str, int] = {}  # tokens of its prompt, by request
        self._results: deque[Future[ModelRunnerOutput]] = deque()
        max_len = self.config.hf_config.max_position_embeddings
        return WorkerReady(max_len, NUM_BLOCKS, BLOCK_SIZE, 1, 256, 8192, "none", "none")

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        began, missing = time.monotonic(), self._missing
        for request_id in plan.finished_req_ids:
            del missing[request_id]
        for new in plan.scheduled_new_reqs:
            missing[new.request_id] = len(new.prompt_token_ids) - new.num_computed_tokens
        tokens = []
        for request_id, num_new in plan.num_scheduled_tokens.items():
            missing[request_id] -= num_new
            tokens.append([self._pick.randrange(self._vocab_size)] if missing[request_id] <= 0 else [])
        time.sleep(max(0.0, self._step_s - (time.monotonic() - began)))
        self._results.append(_done(ModelRunnerOutput(list(plan.num_scheduled_tokens), tokens)))
        return _done(None)

    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        return self._results.popleft()

    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        return []

    def shutdown(self) -> None:
        pass


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def processor_us(pids: dict[str, int]) -> Counter[str]:
    """Microseconds that each process's threads have had, by "process thread"; those of one name together."""
    spent: Counter[str] = Counter()
    for process, pid in pids.items():
        for task in Path(f"/proc/{pid}/task").iterdir():
            name = "main" if task.name == str(pid) else (task / "comm").read_text().strip()
            spent[f"{process} {name}"] += int((task / "schedstat").read_text().split()[0]) / 1e3
    return spent


def chat_load(load: Any) -> type:
    """load.py's client, asking for chat: a message of words where completions have token ids."""

    class ChatLoad(load.Load):
        def _request(self, prompt: list[int], num_out: int) -> bytes:
            words = " ".join(str(token_id) for token_id in prompt[::4])
            body = {
                "model": self._model,
                "messages": [{"role": "user", "content": words}],
                "max_tokens": num_out,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            content = json.dumps(body).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._address[0]}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            return head.encode() + content

    return ChatLoad


def main() -> None:
    import load
    import peers
    import psutil
    import works

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeat", type=int, default=3, help="the median is told")
    parser.add_argument("--step-ms", type=float, default=4.0)
    parser.add_argument("--chat", action="store_true", help="chat instead of completions")
    args = parser.parse_args()
    vocab_size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    command = [sys.executable, "-m", "minivllm.entrypoints.openai.api_server", "--model", str(args.model)]
    command += ["--distributed-executor-backend", "front:NoModel", "--no-enable-prefix-caching"]
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    peer = peers.Peer("front", lambda works: command, env={STEP_MS: str(args.step_ms), "PYTHONPATH": here})
    server = peers.Server(peer, [], Path(tempfile.mkdtemp()) / "server.log")
    try:
        api = psutil.Process(server.processes.root.pid)
        core = max(api.children(), key=lambda child: sum(child.cpu_times()[:2]))
        make = chat_load(load) if args.chat else load.Load
        served = load.served_model(peers.HOST, server.port)
        client = make(peers.HOST, server.port, served, vocab_size, seed=time.time_ns())
        client.run(works.Work(requests=128, streams=64))  # until what is kept is there
        for streams in args.streams:
            measure(client, works.Work(requests=2 * streams, streams=streams), args.repeat, api.pid, core.pid)
    finally:
        server.processes.end()


def measure(client: Any, work: Any, repeat: int, api_pid: int, core_pid: int) -> None:
    import load

    results, spent, pids = [], [], {"api": api_pid, "core": core_pid}
    for _ in range(repeat):
        before = processor_us(pids)
        results.append(client.run(work))
        spent.append({name: us / results[-1].tokens for name, us in (processor_us(pids) - before).items()})
    print(f"{work.streams} streams: {load.describe(load.median(results))}")
    usual = {name: statistics.median(each.get(name, 0.0) for each in spent) for name in spent[-1]}
    shown = sorted(usual.items(), key=lambda item: -item[1])
    print("    µs a token: " + ", ".join(f"{name} {us:.1f}" for name, us in shown if us >= 0.1), flush=True)


if __name__ == "__main__":
    main()
