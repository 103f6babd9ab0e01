"""What --max-num-mixed-prefill-tokens does to streams and first tokens: the real scheduler, steps of a measured cost.

    python benchmarks/mixed_steps.py [--costs 1:50 17:83 …] [--limits 0 32 64 128]

So many streams, each with a new request when the last has ended, as in load.py's W5; or requests that arrive at random
at a share of what the machine can do. A step takes what its rows cost: milliseconds for some numbers of rows, those
between interpolated. The defaults are of the Qwen3-0.6B shape on two vCPUs of a Xeon with AMX (LOG.md).
"""

from __future__ import annotations

import argparse
import bisect
import random
from collections import defaultdict

from minivllm.core.sched.scheduler import Scheduler
from minivllm.messages.engine import EngineCoreRequest
from minivllm.messages.worker import ModelRunnerOutput, SchedulerOutput
from minivllm.sampling_params import SamplingParams

COSTS = "1:50 17:83 33:87 65:108 97:137 129:160 193:205 257:238 513:440 1025:830 2049:1820".split()
NUM_IN = NUM_OUT = 128
SPREAD_MS = 2.0  # between the first requests of the streams
TURN_MS = 5.0  # from a stream's last token to its next request


def cost_of(costs: list[tuple[int, float]], rows: int) -> float:
    """Milliseconds of a step of so many rows."""
    right = min(max(bisect.bisect_left(costs, (rows, 0.0)), 1), len(costs) - 1)
    (low, at_low), (high, at_high) = costs[right - 1], costs[right]
    return at_low + (at_high - at_low) * (rows - low) / (high - low)


def result_of(scheduler: Scheduler, plan: SchedulerOutput) -> ModelRunnerOutput:
    """Token 1 for each request that has caught up."""
    requests = [scheduler.requests[request_id] for request_id in plan.num_scheduled_tokens]
    tokens = [[1] if request.num_computed_tokens == request.num_tokens else [] for request in requests]
    return ModelRunnerOutput(request_ids=list(plan.num_scheduled_tokens), sampled_token_ids=tokens)


class Simulation:
    def __init__(self, costs: list[tuple[int, float]], limit: int) -> None:
        self._costs = costs
        self._scheduler = Scheduler(
            max_num_batched_tokens=2048, max_num_seqs=128, max_model_len=4096, num_blocks=4096, block_size=128,
            max_num_mixed_prefill_tokens=limit, enable_prefix_caching=False,
        )  # fmt: skip
        self._times: defaultdict[str, list[float]] = defaultdict(list)  # arrival, then a token each
        self.now = 0.0

    def add(self, name: str, time: float, num_in: int) -> None:
        self._times[name].append(time)
        params = SamplingParams(max_tokens=NUM_OUT, ignore_eos=True)
        self._scheduler.add_request(EngineCoreRequest(name, [1] * num_in, params, seed=0))

    def step(self) -> list[str]:
        """The requests that ended."""
        plan = self._scheduler.schedule()
        self.now += cost_of(self._costs, plan.total_num_scheduled_tokens)
        ended = []
        for output in self._scheduler.update_from_output(plan, result_of(self._scheduler, plan)).get(0, ()):
            self._times[output.request_id].append(self.now)
            if output.finish_reason is not None:
                ended.append(output.request_id)
        return ended

    def run(self, arrivals: list[tuple[float, int]], streams: int | None) -> str:
        """arrivals: times and prompt lengths; streams: no more at once, the next request comes when one has ended."""
        first = len(arrivals) if streams is None else streams
        coming, later = list(reversed(arrivals[:first])), list(reversed(arrivals[first:]))
        number, num_open = 0, 0
        while coming or num_open:
            while coming and (coming[-1][0] <= self.now or not num_open):
                time, num_in = coming.pop()
                self.now = max(self.now, time)
                self.add(f"r{number}", time, num_in)
                number, num_open = number + 1, num_open + 1
            for _ in self.step():
                num_open -= 1
                if later:
                    coming.insert(0, (self.now + TURN_MS, later.pop()[1]))
        return self._describe()

    def _describe(self) -> str:
        first = sorted(times[1] - times[0] for times in self._times.values())
        gaps = sorted(b - a for times in self._times.values() for a, b in zip(times[1:], times[2:]))
        tokens = sum(len(times) - 1 for times in self._times.values())
        parts = [f"{1e3 * tokens / self.now:7.1f}"]
        for values in (first, gaps):
            parts += [f"{values[len(values) // 2]:7.0f}", f"{values[int(0.99 * len(values))]:7.0f}"]
        return " ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", nargs="+", default=COSTS, metavar="ROWS:MS")
    parser.add_argument("--limits", type=int, nargs="+", default=[0, 16, 32, 48, 64, 96, 128, 256])
    args = parser.parse_args()
    costs = sorted((int(rows), float(ms)) for rows, ms in (each.split(":") for each in args.costs))
    closed = [(SPREAD_MS * i, NUM_IN) for i in range(16)] + [(0.0, NUM_IN)] * 48
    loads: dict[str, tuple[list[tuple[float, int]], int | None]] = {"16 streams, 64 requests": (closed, 16)}
    for rate in (0.5, 0.9):  # requests a second
        pick, time, arrivals = random.Random(0), 0.0, []
        for _ in range(150):
            time += 1e3 * pick.expovariate(rate)
            arrivals.append((time, pick.choice([64, 128, 512, 2000])))
        loads[f"{rate} requests a second, 64 to 2,000 in"] = arrivals, None
    for name, (arrivals, streams) in loads.items():
        print(f"{name}\n  limit   tok/s   first p50, p99   between p50, p99 (ms)")
        for limit in args.limits:
            print(f"  {limit:5} {Simulation(costs, limit).run(arrivals, streams)}", flush=True)


if __name__ == "__main__":
    main()
