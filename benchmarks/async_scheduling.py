"""Output tokens a second with and without --async-scheduling: two engines side by side, asked in turn.

    python benchmarks/async_scheduling.py [--server] [--model DIR] [--batch 1 64] [--rounds 7] [engine arguments …]

Without --model the model in the box. Offline each engine core is a process of its own, as behind a server; with
--server they are servers, under the load of `minivllm bench serve`. The median counts; the first round warms up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path

from peers import Peer, Server

from minivllm import LLM, SamplingParams

MODES = {"sync": "--no-async-scheduling", "async": "--async-scheduling"}


class Engine(ABC):
    @abstractmethod
    def tokens_per_s(self, batch: int, output_len: int) -> float:
        """Answer so many requests at once."""

    @abstractmethod
    def shutdown(self) -> None: ...


class Offline(Engine):
    def __init__(self, model: str, mode: str, engine_args: list[str]) -> None:
        from minivllm.engine.arg_utils import EngineArgs
        from minivllm.utils.argparse_utils import FlexibleArgumentParser

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        args = parser.parse_args([*(["--model", model] if model else []), MODES[mode], *engine_args])
        self._llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))

    def tokens_per_s(self, batch: int, output_len: int) -> float:
        prompts = [[1 + (7 * i + j) % 400 for j in range(32)] for i in range(batch)]
        params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=0, detokenize=False)
        began = time.perf_counter()
        self._llm.generate(prompts, params, use_tqdm=False)
        return batch * output_len / (time.perf_counter() - began)

    def shutdown(self) -> None:
        self._llm.shutdown()


class Served(Engine):
    def __init__(self, model: str, mode: str, engine_args: list[str]) -> None:
        command = [sys.executable, "-m", "minivllm.entrypoints.openai.api_server", MODES[mode]]
        command += [*(["--model", model] if model else []), *engine_args]
        log = Path(tempfile.mkdtemp(prefix="minivllm-bench-")) / f"{mode}.log"
        self._server = Server(Peer(mode, lambda works: command), [], log)

    def tokens_per_s(self, batch: int, output_len: int) -> float:
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "-m", "minivllm.entrypoints.cli.main", "bench", "serve"]
            command += ["--port", str(self._server.port), "--num-prompts", str(batch)]
            command += ["--input-len", "32", "--output-len", str(output_len)]
            command += ["--ignore-eos", "--disable-tqdm", "--save-result"]
            command += ["--result-dir", directory, "--result-filename", "result.json"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            return json.loads((Path(directory) / "result.json").read_text())["output_throughput"]

    def shutdown(self) -> None:
        self._server.processes.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--model", default="")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args, engine_args = parser.parse_known_args()
    kind = Served if args.server else Offline
    engines: dict[str, Engine] = {mode: kind(args.model, mode, engine_args) for mode in MODES}
    print(f"{'batch':>6}" + "".join(f"{mode + ' tok/s':>14}" for mode in MODES) + f"{'async / sync':>14}")
    for batch in args.batch:
        rates: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(args.rounds + 1):
            for mode, engine in engines.items():
                rates[mode].append(engine.tokens_per_s(batch, args.output_len))
        middle = {mode: statistics.median(each[1:]) for mode, each in rates.items()}
        ratio = middle["async"] / middle["sync"]
        print(f"{batch:>6}" + "".join(f"{rate:>14.1f}" for rate in middle.values()) + f"{ratio:>14.3f}", flush=True)
    for engine in engines.values():
        engine.shutdown()


if __name__ == "__main__":
    main()
