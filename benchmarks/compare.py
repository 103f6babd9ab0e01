"""Ours and the peers side by side, back to back in one run: medians, ratios, and the roofline beside them.

    python benchmarks/compare.py --model DIR --tiny DIR [--only W1 T64 …] [--peers ours vllm llama-bf16 …]

Cells: start (seconds to ready, memory), W1, W5 by a server of the model; T1, T64 by a server of the tiny model; W2, W3,
W4 offline, by a batch in one process. What each is: load.py and offline.py. Which peers are there: peers.py. Peers take
turns; of the `--repeat` runs of a cell the median counts. Nothing else should run on the machine.

The last line of a cell is the floor that the roofline of this run gives (floors.py).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import floors
import load
import peers
from peers import Peer, Server, free_port
from roofline import Roofline, measure, table

CELLS = ("start", "W1", "W2", "W3", "W4", "W5", "T1", "T64")
OFFLINE = {
    "ours": "minivllm",
    "ours-int8": "minivllm",
    "vllm": "vllm",
    "transformers": "transformers",
    "openvino": "openvino",
}
INT8 = ["--quantization", "int8", "--kv-cache-dtype", "int8"]


def find_peers(args: argparse.Namespace, model: Path, streams: int) -> dict[str, Peer]:
    """Those that are installed, in the order they are asked for."""
    found = {"ours": peers.ours(model, []), "transformers": peers.transformers()}
    found["ours-int8"] = peers.ours(model, INT8, "ours-int8")
    if args.vllm_python:
        found["vllm"] = peers.vllm(model, args.vllm_python)
    for kind in ("bf16", "q8_0"):
        gguf = (args.gguf_dir or model.parent) / f"{model.name}-{kind}.gguf"
        if args.llama_server and gguf.exists():
            found[f"llama-{kind}"] = peers.llama(args.llama_server, gguf, streams, f"llama-{kind}")
    if args.openvino_python and args.openvino_dir:
        found["openvino"] = peers.openvino(args.openvino_python)
    return {name: found[name] for name in args.peers if name in found}


@dataclass
class Row:
    """What one engine gave in one cell."""

    peer: str
    text: str
    value: float  # that ratios are made of: larger is better, but for seconds


class Comparison:
    """Cells of one model at a time: a peer's server is started once and serves all of them."""

    def __init__(self, args: argparse.Namespace, roof: Roofline) -> None:
        self._args, self._roof = args, roof
        self._logs = Path(tempfile.mkdtemp(prefix="compare-"))

    def run(self, model: Path, cells: list[str]) -> None:
        """Measure all of it, and print cell by cell."""
        rows: dict[str, list[Row]] = {cell: [] for cell in cells}
        served = [cell for cell in cells if cell in load.WORKS or cell == "start"]
        streams = max((load.WORKS[cell].streams for cell in served if cell in load.WORKS), default=4)
        for peer in find_peers(self._args, model, streams).values():
            try:
                if served and peer.server is not None:
                    self._serve(peer, model, served, rows)
                for cell in cells:
                    if cell not in served and peer.offline is not None:
                        self._add(rows, cell, self._offline(cell, peer, model))
            except (RuntimeError, OSError) as error:
                print(f"{peer.name} failed: {error}", flush=True)
        for cell in cells:
            self._print(cell, model, rows[cell])

    def _add(self, rows: dict[str, list[Row]], cell: str, row: Row) -> None:
        """Keep it for the table, and say it at once: the rest takes minutes."""
        rows[cell].append(row)
        print(f"({cell} {row.peer}: {row.text})", file=sys.stderr, flush=True)

    def _print(self, cell: str, model: Path, rows: list[Row]) -> None:
        print(f"\n{cell} ({model.name})")
        for row in rows:
            ratio = f"{row.value / rows[0].value:5.2f} × {rows[0].peer}" if row is not rows[0] else ""
            print(f"  {row.peer:13}{row.text}   {ratio}")
        for line in floors.of_cell(cell, model, self._roof):
            print(f"  {line}")
        sys.stdout.flush()

    def _serve(self, peer: Peer, model: Path, cells: list[str], rows: dict[str, list[Row]]) -> None:
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        with Server(peer, free_port(), self._logs / f"{peer.name}-{model.name}.log") as server:
            if "start" in cells:
                text = f"{server.seconds_to_ready:7.2f} s to ready, {server.memory_mb():6.0f} MB (proportional set)"
                self._add(rows, "start", Row(peer.name, text, server.seconds_to_ready))
            served = load.served_model(peers.HOST, server.port)
            client = load.Load(peers.HOST, server.port, served, vocab_size, seed=time.time_ns())
            client.run(load.Work(2, 2, 128, 16))  # the first request of a server is slow
            for cell in cells:
                if cell in load.WORKS:
                    self._add(rows, cell, self._load(peer, server, client, load.WORKS[cell]))

    def _load(self, peer: Peer, server: Server, client: load.Load, work: load.Work) -> Row:
        cpu = server.cpu_seconds()
        result = load.median([client.run(work) for _ in range(self._args.repeat)])
        us = 1e6 * (server.cpu_seconds() - cpu) / self._args.repeat / result.tokens
        text = f"{load.describe(result)}, server {us:.0f}; {server.memory_mb():.0f} MB"
        return Row(peer.name, text, result.tokens_s)

    def _offline(self, cell: str, peer: Peer, model: Path) -> Row:
        script = str(Path(__file__).with_name("offline.py"))
        if peer.name == "openvino":
            model = self._args.openvino_dir
        command = [*peer.offline, script, "--engine", OFFLINE[peer.name], "--model", str(model), "--work", cell]
        command += ["--repeat", str(self._args.repeat)]
        if peer.name == "ours-int8":
            command += ["--extra", json.dumps({"quantization": "int8", "kv_cache_dtype": "int8"})]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | peer.env)
        if done.returncode:
            raise RuntimeError(done.stderr[-600:])
        found = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
        seconds = ", ".join(f"{s:.2f}" for s in found["seconds"])
        text = f"{found['tokens_s']:9.1f} tok/s   seconds {seconds}   loaded in {found['load_s']:.1f}"
        return Row(peer.name, text, found["tokens_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tiny", type=Path)
    parser.add_argument("--only", choices=CELLS, nargs="+", default=CELLS)
    names = ("ours", "vllm", "llama-bf16", "llama-q8_0", "ours-int8", "transformers", "openvino")
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--vllm-python", default=os.environ.get("VLLM_PYTHON"))
    parser.add_argument("--llama-server", default=os.environ.get("LLAMA_SERVER"))
    parser.add_argument("--gguf-dir", type=Path)
    parser.add_argument("--openvino-python", default=os.environ.get("OPENVINO_PYTHON"))
    parser.add_argument("--openvino-dir", type=Path, help="the model as `optimum-cli export openvino` made it")
    args = parser.parse_args()
    if any(name.startswith("ours") for name in args.peers) and (why := peers.why_ours_is_slow()):
        parser.error(f"{why}; build it (pip install .) and run this from a directory without a source tree")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # whatever ends us, the server that runs ends too
    roof = measure(0.2)
    print(table(roof), flush=True)
    comparison = Comparison(args, roof)
    for model, cells in (
        (args.model, [cell for cell in args.only if not cell.startswith("T")]),
        (args.tiny, [cell for cell in args.only if cell.startswith("T")]),
    ):
        if cells and model is None:
            parser.error(f"{', '.join(cells)} need {'--model' if cells[0][0] != 'T' else '--tiny'}")
        if cells:
            comparison.run(model, cells)


if __name__ == "__main__":
    main()
