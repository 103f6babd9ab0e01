"""How long requests wait for their first token beside long prompts: our share of a step against vLLM's whole step.

    python benchmarks/fairness.py [--json]

Runs the real scheduler with a result that costs nothing and a clock that counts work: a step takes STEP_COST + its
tokens (a step is not free, and is as long as what it computes). So the numbers are of the policy alone, the same on
every machine. Waits are in steps and in that unit of work.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from dataclasses import dataclass, field
from typing import Any

from minivllm.core.sched.scheduler import Scheduler
from minivllm.messages.engine import EngineCoreRequest
from minivllm.messages.worker import ModelRunnerOutput, SchedulerOutput
from minivllm.sampling_params import SamplingParams

BUDGET = 2048  # the default of a server on a CPU, as MAX_NUM_SEQS
MAX_NUM_SEQS = 128
BLOCK_SIZE = 128
LONG = 32_768
STEP_COST = 100  # in tokens
POLICIES = {"minivllm": 0.5, "vllm": 1.0}  # the share of a step that one prompt may take


@dataclass
class Arrival:
    """A request at a time, counted in tokens of work."""

    time: float
    name: str
    num_tokens: int
    max_tokens: int


@dataclass
class Waits:
    """Of one class of requests, until the first token."""

    steps: list[int] = field(default_factory=list)
    work: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        return {
            "requests": len(self.steps),
            "p50_steps": percentile(self.steps, 50),
            "p99_steps": percentile(self.steps, 99),
            "p50_work": percentile(self.work, 50),
            "p99_work": percentile(self.work, 99),
        }


def percentile(values: list[Any], percent: int) -> float:
    """The smallest value that `percent` of them do not exceed."""
    ranked = sorted(values)
    return ranked[-(-len(ranked) * percent // 100) - 1]


def one_long_prompt(pick: random.Random) -> list[Arrival]:
    """Short requests all the time, and in the middle of them one of 32k tokens."""
    return sorted([Arrival(20_000, "long", LONG, 64), *short_ones(pick, 400, every=500)], key=by_time)


def four_long_prompts(pick: random.Random) -> list[Arrival]:
    """The same with four that come together."""
    long_ones = [Arrival(20_000 + i, f"long{i}", LONG, 64) for i in range(4)]
    return sorted([*long_ones, *short_ones(pick, 800, every=500)], key=by_time)


def short_requests_only(pick: random.Random) -> list[Arrival]:
    """Nobody is long: the two policies should not differ."""
    return short_ones(pick, 400, every=300)


def short_ones(pick: random.Random, count: int, *, every: float) -> list[Arrival]:
    time, arrivals = 0.0, []
    for index in range(count):
        time += pick.expovariate(1 / every)
        arrivals.append(Arrival(time, f"short{index}", pick.randint(50, 300), pick.randint(8, 24)))
    return arrivals


def by_time(arrival: Arrival) -> float:
    return arrival.time


SCENARIOS = {
    "one 32k prompt": one_long_prompt,
    "four 32k prompts": four_long_prompts,
    "short requests only": short_requests_only,
}


def make_request(arrival: Arrival) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=arrival.name,
        prompt_token_ids=[zlib.crc32(arrival.name.encode())] * arrival.num_tokens,
        sampling_params=SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True),
        seed=0,
    )


def result_of(scheduler: Scheduler, plan: SchedulerOutput) -> ModelRunnerOutput:
    """Token 1 for each request that has caught up."""
    ids = list(plan.num_scheduled_tokens)
    tokens = [
        [1] if request.num_computed_tokens == request.num_tokens else []
        for request in map(scheduler.requests.__getitem__, ids)
    ]
    return ModelRunnerOutput(request_ids=ids, sampled_token_ids=tokens)


def simulate(arrivals: list[Arrival], prompt_share: float) -> dict[str, Waits]:
    """Waits by class of request."""
    scheduler = Scheduler(
        max_num_batched_tokens=BUDGET,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=LONG + 1024,
        num_blocks=2048,
        block_size=BLOCK_SIZE,
        prompt_share=prompt_share,
    )
    coming = list(reversed(arrivals))
    since: dict[str, tuple[int, float]] = {}
    waits = {"short": Waits(), "long": Waits()}
    step, clock = 0, 0.0
    while coming or scheduler.has_unfinished_requests():
        while coming and (coming[-1].time <= clock or not scheduler.has_unfinished_requests()):
            arrival = coming.pop()
            clock = max(clock, arrival.time)
            since[arrival.name] = (step, arrival.time)
            scheduler.add_request(make_request(arrival))
        plan = scheduler.schedule()
        step += 1
        clock += STEP_COST + plan.total_num_scheduled_tokens
        for output in scheduler.update_from_output(plan, result_of(scheduler, plan)).get(0, ()):
            if output.new_token_ids and output.request_id in since:
                first_step, arrived = since.pop(output.request_id)
                of_class = waits["long" if output.request_id.startswith("long") else "short"]
                of_class.steps.append(step - first_step)
                of_class.work.append(clock - arrived)
    return {name: each for name, each in waits.items() if each.steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    as_json = parser.parse_args().json
    report: dict[str, Any] = {}
    for scenario, make_arrivals in SCENARIOS.items():
        for policy, share in POLICIES.items():
            waits = simulate(make_arrivals(random.Random(0)), share)
            report[f"{scenario}, {policy}"] = {name: each.row() for name, each in waits.items()}
    if as_json:
        print(json.dumps(report, indent=1))
        return
    columns = ("requests", "p50_steps", "p99_steps", "p50_work", "p99_work")
    print(f"{'until the first token':42}" + "".join(f"{name.replace('_', ' '):>11}" for name in columns))
    for title, rows in report.items():
        for name, row in rows.items():
            print(f"{title + ': ' + name:42}" + "".join(f"{round(row[column]):>11}" for column in columns))


if __name__ == "__main__":
    main()
