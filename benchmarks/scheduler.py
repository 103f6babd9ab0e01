"""What the control side costs: microseconds of the real scheduler a step and a token, with a result that costs nothing.

    python benchmarks/scheduler.py [--num-seqs 256] [--steps 2000]

Three loads, each at `--num-seqs` running requests: all decode; all decode while prompts arrive and end (churn); and a
cache so small that requests are preempted (tight). Counted is the processor's time in `schedule` and
`update_from_output`. Each load runs three times; the fastest counts, for what is slower was disturbed.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Iterator

from minivllm.core.sched.scheduler import Scheduler
from minivllm.messages.engine import EngineCoreRequest
from minivllm.messages.worker import ModelRunnerOutput, SchedulerOutput
from minivllm.sampling_params import SamplingParams

BLOCK_SIZE = 128
PROMPT = 512
RUNS = 3


def make_request(number: int, num_tokens: int, max_tokens: int) -> EngineCoreRequest:
    pick = random.Random(number)
    return EngineCoreRequest(
        request_id=f"request-{number}",
        prompt_token_ids=[pick.randrange(50_000) for _ in range(num_tokens)],
        sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        seed=number,
    )


def result_of(scheduler: Scheduler, plan: SchedulerOutput) -> ModelRunnerOutput:
    """Token 1 for each request that has caught up."""
    requests = scheduler.requests
    ids = list(plan.num_scheduled_tokens)
    caught_up = (requests[i].num_computed_tokens == requests[i].num_tokens for i in ids)
    return ModelRunnerOutput(request_ids=ids, sampled_token_ids=[[1] if yes else [] for yes in caught_up])


class Load:
    """A scheduler with `num_seqs` requests that run, and more to come."""

    def __init__(self, num_seqs: int, max_tokens: int, num_blocks: int) -> None:
        self._num_seqs = num_seqs
        self._max_tokens = max_tokens
        self._num_added = 0
        self.scheduler = Scheduler(
            max_num_batched_tokens=8192,
            max_num_seqs=num_seqs,
            max_model_len=PROMPT + 8192,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
        )
        self.fill()

    def fill(self) -> None:
        while len(self.scheduler.requests) < self._num_seqs:
            self.scheduler.add_request(make_request(self._num_added, PROMPT, self._max_tokens))
            self._num_added += 1

    def steps(self, count: int) -> Iterator[tuple[float, int, int]]:
        """Seconds in the scheduler, requests in the step and tokens computed, step by step."""
        for _ in range(count):
            begin = time.process_time()
            plan = self.scheduler.schedule()
            planned = time.process_time()
            result = result_of(self.scheduler, plan)
            resumed = time.process_time()
            self.scheduler.update_from_output(plan, result)
            seconds = time.process_time() - resumed + planned - begin
            yield seconds, len(plan.num_scheduled_tokens), plan.total_num_scheduled_tokens
            self.fill()


def measure(num_seqs: int, num_steps: int, *, max_tokens: int, num_blocks: int) -> tuple[float, ...]:
    """Mean microseconds a step, a request in a step and a token computed; and requests in a step."""
    best = (float("inf"), 0.0, 0.0, 0.0)
    for _ in range(RUNS):
        load = Load(num_seqs, max_tokens, num_blocks)
        for _ in load.steps(2 * num_seqs * PROMPT // 8192 + 20):  # until all run
            pass
        gc.collect()
        gc.freeze()
        rows = list(load.steps(num_steps))
        gc.unfreeze()
        seconds, requests, tokens = map(sum, zip(*rows))
        us = seconds * 1e6
        best = min(best, (us / num_steps, us / requests, us / tokens, requests / num_steps))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seqs", type=int, default=256, help="running requests")
    parser.add_argument("--steps", type=int, default=2000, help="measured steps")
    args = parser.parse_args()
    roomy = args.num_seqs * 80 + 200
    loads = {
        "decode": {"max_tokens": 8192, "num_blocks": roomy},
        "churn": {"max_tokens": 64, "num_blocks": roomy},
        "tight": {"max_tokens": 512, "num_blocks": args.num_seqs * 6},
    }
    print(f"{'load':10}{'us a step':>12}{'us a request':>14}{'us a token':>12}{'requests a step':>17}")
    for name, load in loads.items():
        per_step, per_request, per_token, requests = measure(args.num_seqs, args.steps, **load)
        print(f"{name:10}{per_step:12.1f}{per_request:14.3f}{per_token:12.3f}{requests:17.1f}")


if __name__ == "__main__":
    main()
