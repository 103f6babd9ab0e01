"""Microseconds a step of the core spends outside kernels, and where: a decode, or a prompt's only step.

    python benchmarks/step_overhead.py --model DIR [--batch 1 64] [--prompts 128 512] [--steps 300] [--profile]

The core runs in this process; every call of the native extension is timed, the rest of the step is overhead: Python,
torch and numpy. Steps are replayed in one such call; what is in a decode is shown by making its calls again, one by
one, in wall time. Processor time of the main thread is counted, so that a disturbed machine disturbs little. Encoding
and decoding of the step's message stand beside it. Prompts come alone, of so many tokens and up to 9 fewer, and get one
token each.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from minivllm.engine.arg_utils import EngineArgs
from minivllm.messages.codec import Decoder, encode
from minivllm.messages.engine import EngineCoreOutputs, EngineCoreRequest
from minivllm.sampling_params import SamplingParams

NUM_IN = 128
now = time.thread_time_ns


class Clock:
    """Nanoseconds under names; what a call inside a call takes counts for the inner one only."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, int] = defaultdict(int)
        self._inner = 0
        begin = now()
        for _ in range(1000):
            now()
        self._cost = (now() - begin) // 1000  # of looking at the clock: a call looks twice, and half of it counts

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            outer, self._inner = self._inner, 0
            begin = now()
            try:
                return call(*args, **kwargs)
            finally:
                took = now() - begin - self._cost
                self.spent[name] += took - self._inner
                self._inner = outer + took + 2 * self._cost

        return wrapper

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))


def build_core(model: str, clock: Clock, extra: dict[str, Any]) -> Any:
    """Every function of the extension is timed from here on, as it is found where the ops look for it."""
    from minivllm.engine.core import EngineCore
    from minivllm.ops.recording import native_functions
    from minivllm.utils.native import lib

    for owner, name, _ in list(native_functions()):
        clock.wrap(owner, name, f"kernel {name}")
    clock.wrap(lib.Tape, "replay", "kernels of a recorded step")

    options = {"kv_cache_memory_bytes": 1 << 30, "max_model_len": 4096, "enable_prefix_caching": False} | extra
    config = EngineArgs(model=model, **options).create_engine_config("offline")
    return EngineCore(config, on_death=print, on_progress=lambda phase: None)


def add_requests(core: Any, batch: int, num_out: int, temperature: float, num_in: int = NUM_IN) -> None:
    pick = random.Random(0)
    vocab_size = core.ready.vocab_size
    for number in range(batch):
        core.add_request(
            EngineCoreRequest(
                request_id=f"request-{number}",
                prompt_token_ids=[pick.randrange(vocab_size) for _ in range(num_in)],
                sampling_params=SamplingParams(max_tokens=num_out, ignore_eos=True, temperature=temperature),
                seed=number,
            )
        )


def measure_prompts(core: Any, clock: Clock, num_in: int, steps: int) -> None:
    totals, kernels, first, wall = [], [], [], []
    for number in range(steps + 8):
        add_requests(core, 1, 1, 0.0, num_in - number % 10)
        clock.spent.clear()
        begin, began = now(), time.perf_counter_ns()
        core.step()
        took, elapsed = now() - begin, time.perf_counter_ns() - began
        if number < 3:
            first.append(elapsed)
        if number >= 8:
            totals.append(took)
            wall.append(elapsed)
            kernels.append(sum(ns for name, ns in clock.spent.items() if name.startswith("kernel")))
        while core.has_requests():
            core.step()
    outside = statistics.median(t - k for t, k in zip(totals, kernels)) / 1e6
    total, kernel = statistics.median(totals) / 1e6, statistics.median(kernels) / 1e6
    print(
        f"prompts of {num_in}: step {total:.2f} ms = kernels {kernel:.2f} + outside {outside:.2f}; by the clock "
        f"{min(wall) / 1e6:.1f} at best, {statistics.median(wall) / 1e6:.1f} in the middle, "
        f"{', '.join(f'{ns / 1e6:.1f}' for ns in first)} the first three"
    )


def measure(core: Any, clock: Clock, batch: int, steps: int, temperature: float, profile: bool) -> None:
    add_requests(core, batch, steps + 50, temperature)
    for _ in range(20):
        core.step()
    profiler = cProfile.Profile()
    decode = Decoder(EngineCoreOutputs)
    totals, kernels = [], []
    spent: defaultdict[str, list[int]] = defaultdict(list)
    gc.collect()
    gc.freeze()
    for _ in range(steps):
        clock.spent.clear()
        if profile:
            profiler.enable()
        begin = now()
        outputs = core.step()
        totals.append(now() - begin)
        if profile:
            profiler.disable()
        kernels.append(sum(ns for name, ns in clock.spent.items() if name.startswith("kernel")))
        for name, ns in clock.spent.items():
            spent[name].append(ns)
        begin = now()
        data = encode(outputs[0])
        spent["(beside) encode"].append(now() - begin)
        begin = now()
        decode(data)
        spent["(beside) decode"].append(now() - begin)
    gc.unfreeze()
    outside = statistics.median(t - k for t, k in zip(totals, kernels)) / 1e3
    total, kernel = statistics.median(totals) / 1e3, statistics.median(kernels) / 1e3
    print(
        f"batch {batch}, temperature {temperature}: step {total:.0f} µs = kernels {kernel:.0f} + outside {outside:.0f} "
        f"({outside / batch:.1f} a request)"
    )
    usual = {name: statistics.median(ns) / 1e3 for name, ns in spent.items() if len(ns) > steps // 2}
    for name, us in sorted(usual.items(), key=lambda item: -item[1]):
        print(f"    {us:9.1f}  {name}")
    show_recorded(core.executor.worker.runner)
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
    core.abort_all()
    while core.has_requests():
        core.step()


def show_recorded(runner: Any, repeat: int = 50) -> None:
    """What the calls of the last step take, if it was recorded: made again, they write what is there already."""
    parts = [runner._recorded, *runner._recorded_decodes.values()] if runner.is_recorded else []
    tapes = [part.recording.recording.tape for part in parts if part.recording is not None]
    if not tapes:
        return
    names = [name for tape in tapes for name in tape.names]
    replays = ([ns for tape in tapes for ns in tape.timed_replay()] for _ in range(repeat))
    took = [statistics.median(each) / 1e3 for each in zip(*replays)]
    print(f"    its {len(took)} recorded calls: {sum(took):.0f} µs of wall time")
    for name in sorted(set(names), key=lambda n: -sum(us for us, other in zip(took, names) if other == n)):
        own = [us for us, other in zip(took, names) if other == name]
        print(f"    {sum(own):9.1f}  {name}: {len(own)} × {statistics.mean(own):.1f}, the largest {max(own):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 64], help="of decodes")
    parser.add_argument("--prompts", type=int, nargs="+", default=[], help="lengths, in tokens")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--enforce-eager", action="store_true", help="without replaying steps")
    parser.add_argument("--profile", action="store_true", help="a profile of the steps as well (it slows them)")
    args = parser.parse_args()
    clock = Clock()
    core = build_core(args.model, clock, {"enforce_eager": args.enforce_eager})
    clock.wrap(core.scheduler, "schedule", "schedule")
    clock.wrap(core.scheduler, "update_from_output", "update_from_output")
    worker = core.executor.worker
    clock.wrap(worker, "execute_model", "execute_model, not the model")
    clock.wrap(worker.runner.model, "forward", "model forward, eager, not its kernels")
    clock.wrap(worker, "sample_tokens", "sample_tokens, not its kernels")
    for num_in in args.prompts:
        measure_prompts(core, clock, num_in, args.steps)
    for batch in args.batch:
        measure(core, clock, batch, args.steps, args.temperature, args.profile)
    core.shutdown()


if __name__ == "__main__":
    main()
