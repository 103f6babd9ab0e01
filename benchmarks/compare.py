"""Ours and the peers side by side, in turns, in one run: medians, ratios, floors, and the roofline beside them.

    python benchmarks/compare.py --model DIR --tiny DIR [--only W1 T64 …] [--peers ours vllm …] [--minutes 30]

Cells: start (seconds to ready, memory), W1 and W5 by a server of the model, W3, W4 and W2 by batches in one process, T1
and T64 by a server of the tiny model. What they are: works.py; which peers are there: peers.py. Each engine is started
once for all its cells (those that start in seconds: for each), and stopped by a signal while another has its turn; of
three rounds the medians count. llama.cpp does the batches through its server. A slow engine is asked for a part of a
load, and its row says so; one that fails or takes too long (--run-limit) gets the reason in its row.

Everything is written as it comes to --results (a line each) and to a table beside it (.md). Cut off or out of
--minutes, the same command with the same file goes on where it was. Nothing it started outlives it. Nothing else should
run on the machine. --table prints the table of a file and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import load
import peers
from peers import Offline, Peer, Server
from processes import Guard
from results import Results, as_table
from roofline import measure, table
from works import WORKS, Work

# Cells of a kind in the order of what they say, and the share of the time by whose end they should be done.
SERVED, BATCHES, TINY = ("start", "W1", "W5"), ("W3", "W4", "W2"), ("T1", "T64")
CELLS = (*SERVED, *BATCHES, *TINY)
SERVED_UNTIL, BATCHES_UNTIL = 0.44, 0.9
NAMES = ("ours", "ours-int8", "ours-int4", "vllm", "llama-bf16", "llama-q8_0", "openvino", "transformers")
ONLY_IF_NAMED = ("ours-int4",)  # the peers' models have no weights of 4 bits
USUAL = tuple(name for name in NAMES if name not in ONLY_IF_NAMED)
USUAL_TINY = ("ours", "vllm", "llama-bf16", "llama-q8_0")
START_LIMIT_S = 240
SLOW_START_S = 20  # who needs longer is not started again for a median


def find_peers(args: argparse.Namespace, model: Path, asked: Collection[str]) -> dict[str, Peer]:
    """Those of `asked` that are installed, in the order of NAMES."""
    found = {
        "ours": peers.ours(model, {}),
        "ours-int8": peers.ours_int8(model),
        "ours-int4": peers.ours_int4(model),
        "transformers": peers.transformers(model),
    }
    if args.vllm_python:
        found["vllm"] = peers.vllm(model, args.vllm_python)
    for kind in ("bf16", "q8_0"):
        gguf = (args.gguf_dir or model.parent) / f"{model.name}-{kind}.gguf"
        if args.llama_server and gguf.exists():
            found[f"llama-{kind}"] = peers.llama(args.llama_server, gguf, f"llama-{kind}")
    if args.openvino_python and args.openvino_dir:
        found["openvino"] = peers.openvino(args.openvino_dir, args.openvino_python)
    return {name: found[name] for name in NAMES if name in asked and name in found}


@dataclass
class Turn:
    """One run of one engine in one cell."""

    cell: str
    peer: Peer


class CannotStart(RuntimeError):
    """It is not tried again in this phase."""


class Engine:
    """A peer that runs, or will when it first has a turn: by its server, or by batches in a process."""

    def __init__(self, peer: Peer, model: Path, works: list[Work], by_server: bool, guard: Guard, log: Path) -> None:
        self.peer, self.by_server, self._model, self._works = peer, by_server, model, works
        self._guard, self._log = guard, log
        self._running: Server | Offline | None = None
        self._is_warm = False

    def start(self, works: list[Work], limit_s: float) -> float:
        """Start it anew; seconds until it was ready. Raises CannotStart."""
        self.end()
        self._is_warm = False
        try:
            if self.by_server:
                self._running = Server(self.peer, works, self._log, guard=self._guard, limit_s=limit_s)
            else:
                self._running = Offline(self.peer, self._log, guard=self._guard, limit_s=limit_s)
        except (RuntimeError, OSError) as error:
            raise CannotStart(str(error)) from error
        return self._running.seconds_to_ready

    def start_for_all(self) -> float:
        """One that is started for each load has no sizes for all of them together: W5's."""
        return self.start(self._works if self.peer.stays else [WORKS["W5"]], START_LIMIT_S)

    def run(self, cell: str, work: Work, limit_s: float) -> dict:
        """What one run gave. Raises RuntimeError or OSError: it is of no use any more."""
        self._wake(work)
        running = self._running
        cpu = running.processes.cpu_seconds()
        if isinstance(running, Server):
            result = self._client(running).run(work, limit_s)
            found = {key: getattr(result, key) for key in ("tokens_s", "seconds", "own_us_a_token")}
            for key in ("first_ms_p50", "first_ms_p99", "inter_ms_p50", "inter_ms_p99"):
                found[key] = getattr(result, key)
        else:
            found = running.run(cell, work.requests, limit_s)
            del found["work"]
        cpu = running.processes.cpu_seconds() - cpu
        found["us_a_token"] = 1e6 * cpu / (work.requests * work.num_out)
        return found | {"requests": work.requests, "memory_mb": running.processes.memory_mb()}

    def memory(self) -> dict:
        return {
            "memory_mb": self._running.processes.memory_mb(),
            "peak_mb": self._running.processes.peak_mb(),
        }

    def rest(self) -> None:
        """Its turn is over."""
        if self._running is not None:
            if self.peer.stays:
                self._running.processes.pause()
            else:
                self.end()

    def end(self) -> None:
        if self._running is not None:
            self._running.processes.end()
            self._running = None

    def _wake(self, work: Work) -> None:
        if self._running is None:
            self.start(self._works if self.peer.stays else [work], START_LIMIT_S)
        self._running.processes.resume()
        if self._is_warm:
            return
        self._is_warm = True
        if isinstance(self._running, Server):
            warm = Work(2, 2, 64, 8) if work.streams > 1 else Work(1, 1, 64, 8)
            self._client(self._running).run(warm, 60)  # the first request of a server is slow
        self._running.processes.settle(15)

    def _client(self, server: Server) -> load.Load:
        vocab_size = json.loads((self._model / "config.json").read_text())["vocab_size"]
        served = load.served_model(peers.HOST, server.port)
        return load.Load(peers.HOST, server.port, served, vocab_size, seed=time.time_ns())


class Phase:
    """Some cells of one model, served or in batches: rounds of turns until all is measured or the time is over."""

    def __init__(
        self, args: argparse.Namespace, results: Results, guard: Guard, model: Path, cells: list[str], until: float
    ) -> None:
        self._args, self._results, self._model, self._cells, self._until = args, results, model, cells, until
        self._is_served = args.all_served or not set(cells) & set(BATCHES)
        works = [WORKS[cell] for cell in cells if cell in WORKS]
        logs = Path(tempfile.mkdtemp(prefix="compare-"))
        self._engines = {}
        asked = args.peers or (USUAL_TINY if cells[0] in TINY else USUAL)
        for name, peer in find_peers(args, model, asked).items():
            by_server = peer.server is not None and (self._is_served or peer.by_server)
            if by_server or (peer.offline is not None and set(cells) & set(BATCHES)):
                log = logs / f"{name}-{model.name}.log"
                self._engines[name] = Engine(peer, model, works, by_server, guard, log)

    def run(self) -> None:
        if not any(True for _ in self._open_turns()):
            return
        say(f"{self._model.name}: {', '.join(self._cells)}; {', '.join(self._engines)}")
        try:
            roof = measure(0.15)
            say(table(roof))
            self._results.add_roofline(roof)
            for _ in range(self._args.repeat):
                for turn in self._open_turns():
                    self._take(turn)
        finally:
            for engine in self._engines.values():
                engine.end()

    def _open_turns(self) -> Iterator[Turn]:
        """One for each engine in each cell that has fewer runs than it should."""
        for cell in self._cells:
            for name, engine in self._engines.items():
                if not engine.by_server and cell not in BATCHES:
                    continue
                key = (str(self._model), cell, name)
                runs = engine.peer.shares.get(cell, peers.Share()).runs or self._args.repeat
                done = self._results.of(*key)
                if cell == "start" and done and done[-1]["seconds"] > SLOW_START_S:
                    continue
                if len(done) < runs and self._results.failure(*key) is None:
                    yield Turn(cell, engine.peer)

    def _take(self, turn: Turn) -> None:
        engine, key = self._engines[turn.peer.name], (str(self._model), turn.cell, turn.peer.name)
        before = self._results.of(*key)
        expected = before[-1]["seconds"] if before else 0
        if time.monotonic() + expected > self._until:
            say(f"({turn.cell} {turn.peer.name}: no time for it)")
            return
        line = dict(zip(("model", "cell", "engine"), key))
        try:
            if turn.cell == "start":
                found = {"kind": "start", "seconds": engine.start_for_all(), **engine.memory()}
            else:
                work, share = WORKS[turn.cell], turn.peer.shares.get(turn.cell, peers.Share())
                requests = share.requests or work.requests
                work = work.part(min(requests, 2) if self._args.smoke else requests)
                found = {"kind": "run", **engine.run(turn.cell, work, self._args.run_limit)}
            engine.rest()
            self._results.add(**line, **found)
            numbers = ", ".join(f"{name} {value:.5g}" for name, value in found.items() if name != "kind")
            say(f"({turn.cell} {turn.peer.name}: {numbers})")
        except Exception as error:  # whatever ails one engine, the others have their turns
            engine.end()
            cells = self._cells if isinstance(error, CannotStart) else [turn.cell]
            for cell in cells:
                why = " ".join(str(error).split())[-300:] or type(error).__name__
                self._results.add(**line | {"cell": cell}, kind="failed", why=why)
            say(f"({', '.join(cells)} {turn.peer.name}: {error})")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tiny", type=Path)
    parser.add_argument("--only", choices=CELLS, nargs="+", default=CELLS)
    usual = f"by default {', '.join(USUAL)}; of the tiny model {', '.join(USUAL_TINY)}"
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=(), help=usual)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30, help="begin nothing that would end later")
    parser.add_argument("--run-limit", type=float, default=150, help="seconds after which a run is given up")
    parser.add_argument("--smoke", action="store_true", help="two requests of each load: does every engine work?")
    parser.add_argument("--results", type=Path, default=Path("compare.jsonl"))
    parser.add_argument("--table", action="store_true")
    all_served = "batches too by the servers of those that have one: one start for all"
    parser.add_argument("--all-served", action="store_true", help=all_served)
    parser.add_argument("--vllm-python", default=os.environ.get("VLLM_PYTHON"))
    parser.add_argument("--llama-server", default=os.environ.get("LLAMA_SERVER"))
    parser.add_argument("--gguf-dir", type=Path)
    parser.add_argument("--openvino-python", default=os.environ.get("OPENVINO_PYTHON"))
    parser.add_argument("--openvino-dir", type=Path, help="the model as `optimum-cli export openvino` made it")
    args = parser.parse_args()
    results = Results(args.results)
    if args.table:
        print(as_table(results))
        return
    if any(name.startswith("ours") for name in args.peers or USUAL) and (why := peers.why_ours_is_slow()):
        parser.error(f"{why}; build it (pip install .) and run this from a directory without a source tree")
    plan = []
    for kind, model, option, share in (
        (SERVED, args.model, "--model", SERVED_UNTIL),
        (BATCHES, args.model, "--model", BATCHES_UNTIL),
        (TINY, args.tiny, "--tiny", 1.0),
    ):
        cells = [cell for cell in kind if cell in args.only]
        if cells and model is None:
            parser.error(f"{', '.join(cells)} need {option}")
        if cells:
            plan.append((model.resolve(), cells, share))
    if args.all_served and len(plan) > 1 and plan[0][0] == plan[1][0]:
        plan[:2] = [(plan[0][0], [*plan[0][1], *plan[1][1]], BATCHES_UNTIL)]
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # whatever ends us, what runs ends too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    guard = Guard()
    with suppress(KeyboardInterrupt):
        for i, (model, cells, share) in enumerate(plan):
            share = 1.0 if i == len(plan) - 1 else share
            Phase(args, results, guard, model, cells, began + 60 * args.minutes * share).run()
    print(as_table(results))


if __name__ == "__main__":
    main()
