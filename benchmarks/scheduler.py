"""What the control side costs: microseconds of the real scheduler a step and a token, with a result that costs nothing.

    python benchmarks/scheduler.py [--num-seqs 256] [--steps 2000] [--vllm-python PATH --model DIR]

Three loads, each at `--num-seqs` running requests: all decode; all decode while prompts arrive and end (churn); and a
cache so small that requests are preempted (tight). Counted is the processor's time in `schedule` and
`update_from_output`. Each load runs three times; the fastest counts, for what is slower was disturbed.

With the Python of an environment that has vLLM 0.32, the same file drives vLLM's scheduler with the same loads; the two
take turns, load by load. vLLM needs a model's config.json for it (`--model`), no weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

BLOCK_SIZE = 128
PROMPT = 512
MAX_MODEL_LEN = PROMPT + 8192
STEP_TOKENS = 8192
RUNS = 3
FIELDS = ("us a step", "us a request", "us a token", "requests a step")


def prompt_of(number: int) -> list[int]:
    pick = random.Random(number)
    return [pick.randrange(50_000) for _ in range(PROMPT)]


class Load(ABC):
    """A scheduler with `num_seqs` requests that run, and more to come."""

    scheduler: Any

    def __init__(self, num_seqs: int, max_tokens: int) -> None:
        self._num_seqs = num_seqs
        self._max_tokens = max_tokens
        self._num_added = 0

    @abstractmethod
    def add(self, number: int) -> None:
        """One more request."""

    @abstractmethod
    def result_of(self, plan: Any) -> Any:
        """Token 1 for each request that has caught up."""

    def fill(self) -> None:
        while len(self.scheduler.requests) < self._num_seqs:
            self.add(self._num_added)
            self._num_added += 1

    def steps(self, count: int) -> Iterator[tuple[float, int, int]]:
        """Seconds in the scheduler, requests in the step and tokens computed, step by step."""
        for _ in range(count):
            self.fill()
            begin = time.process_time()
            plan = self.scheduler.schedule()
            planned = time.process_time()
            result = self.result_of(plan)
            resumed = time.process_time()
            self.scheduler.update_from_output(plan, result)
            seconds = time.process_time() - resumed + planned - begin
            yield seconds, len(plan.num_scheduled_tokens), plan.total_num_scheduled_tokens


class OurLoad(Load):
    def __init__(self, num_seqs: int, *, max_tokens: int, num_blocks: int, model: str | None) -> None:
        from minivllm.core.sched.scheduler import Scheduler

        super().__init__(num_seqs, max_tokens)
        self.scheduler = Scheduler(
            max_num_batched_tokens=STEP_TOKENS,
            max_num_seqs=num_seqs,
            max_model_len=MAX_MODEL_LEN,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
        )

    def add(self, number: int) -> None:
        from minivllm.messages.engine import EngineCoreRequest
        from minivllm.sampling_params import SamplingParams

        self.scheduler.add_request(
            EngineCoreRequest(
                request_id=f"request-{number}",
                prompt_token_ids=prompt_of(number),
                sampling_params=SamplingParams(max_tokens=self._max_tokens, ignore_eos=True),
                seed=number,
            )
        )

    def result_of(self, plan: Any) -> Any:
        from minivllm.messages.worker import ModelRunnerOutput

        requests = self.scheduler.requests
        ids = list(plan.num_scheduled_tokens)
        caught_up = (requests[i].num_computed_tokens == requests[i].num_tokens for i in ids)
        return ModelRunnerOutput(request_ids=ids, sampled_token_ids=[[1] if yes else [] for yes in caught_up])


class VllmLoad(Load):
    def __init__(self, num_seqs: int, *, max_tokens: int, num_blocks: int, model: str | None) -> None:
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        if model is None:
            sys.exit("vLLM's scheduler wants a model's config.json: --model DIR")
        super().__init__(num_seqs, max_tokens)
        args = EngineArgs(
            model=model,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=STEP_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            block_size=BLOCK_SIZE,
            enable_prefix_caching=True,
            async_scheduling=False,
            skip_tokenizer_init=True,
            hf_overrides={"max_position_embeddings": MAX_MODEL_LEN},
        )
        config = args.create_engine_config()
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
        cache = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.scheduler = Scheduler(config, cache, StructuredOutputManager(config), BLOCK_SIZE, log_stats=True)

    def add(self, number: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self.scheduler.add_request(
            Request(
                request_id=f"request-{number}",
                prompt_token_ids=prompt_of(number),
                sampling_params=SamplingParams(max_tokens=self._max_tokens, ignore_eos=True, seed=number),
                pooling_params=None,
                block_hasher=self._hasher,
            )
        )

    def result_of(self, plan: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        requests = self.scheduler.requests
        ids = list(plan.num_scheduled_tokens)
        caught_up = (requests[i].num_computed_tokens == requests[i].num_tokens for i in ids)
        tokens = [[1] if yes else [] for yes in caught_up]
        return ModelRunnerOutput(
            req_ids=ids, req_id_to_index={name: i for i, name in enumerate(ids)}, sampled_token_ids=tokens
        )


SIDES = {"ours": OurLoad, "vllm": VllmLoad}


def loads(num_seqs: int) -> dict[str, dict[str, int]]:
    roomy = num_seqs * 80 + 200
    return {
        "decode": {"max_tokens": 8192, "num_blocks": roomy},
        "churn": {"max_tokens": 64, "num_blocks": roomy},
        "tight": {"max_tokens": 512, "num_blocks": num_seqs * 6},
    }


def measure(side: str, name: str, num_seqs: int, num_steps: int, model: str | None) -> tuple[float, ...]:
    """Mean microseconds a step, a request in a step and a token computed; and requests in a step."""
    best = (float("inf"), 0.0, 0.0, 0.0)
    for _ in range(RUNS):
        load = SIDES[side](num_seqs, model=model, **loads(num_seqs)[name])
        for _ in load.steps(2 * num_seqs * PROMPT // STEP_TOKENS + 20):  # until all run
            pass
        gc.collect()
        gc.freeze()
        rows = list(load.steps(num_steps))
        gc.unfreeze()
        seconds, requests, tokens = map(sum, zip(*rows))
        us = seconds * 1e6
        best = min(best, (us / num_steps, us / requests, us / tokens, requests / num_steps))
    return best


def measure_in(python: str, args: argparse.Namespace, name: str) -> tuple[float, ...]:
    """The same, of vLLM, in a process of its own."""
    command = [python, __file__, "--side", "vllm", "--load", name, "--num-seqs", str(args.num_seqs)]
    command += ["--steps", str(args.steps), *(["--model", args.model] if args.model else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, default=256, help="running requests")
    parser.add_argument("--steps", type=int, default=2000, help="measured steps")
    parser.add_argument("--load", choices=loads(1), help="this one only")
    parser.add_argument("--vllm-python", metavar="PATH", help="a Python that has vLLM 0.32")
    parser.add_argument("--model", metavar="DIR", help="a model directory, for vLLM's configuration")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one load, as a line of JSON
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.load, args.num_seqs, args.steps, args.model)))
        return
    print(f"{'load':9}{'':6}" + "".join(f"{field:>17}" for field in FIELDS))
    for name in [args.load] if args.load else loads(1):
        rows = {"ours": measure("ours", name, args.num_seqs, args.steps, args.model)}
        if args.vllm_python:
            rows["vllm"] = measure_in(args.vllm_python, args, name)
        for side, row in rows.items():
            print(f"{name:9}{side:6}" + "".join(f"{value:17.3f}" for value in row), flush=True)
        if args.vllm_python:
            ratios = (rows["ours"][i] / rows["vllm"][i] for i in range(3))
            print(f"{'':9}{'ratio':6}" + "".join(f"{ratio:17.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
