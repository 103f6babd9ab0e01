"""Output tokens a second with and without --async-scheduling, offline: two engines side by side, asked in turn.

    python benchmarks/async_scheduling.py [--model DIR] [--batch 1 64] [--rounds 7] [engine arguments …]

Without --model the model in the box. Each engine core is a process of its own, as behind a server. The median counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

from minivllm import LLM, SamplingParams

MODES = {"sync": False, "async": True}


def tokens_per_s(llm: LLM, batch: int, output_len: int) -> float:
    prompts = [[1 + (7 * i + j) % 400 for j in range(32)] for i in range(batch)]
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=0, detokenize=False)
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return batch * output_len / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--distributed-executor-backend", default="uni")
    args = parser.parse_args()
    llms = {
        name: LLM(
            args.model,
            async_scheduling=is_async,
            max_model_len=512,
            kv_cache_memory_bytes=1 << 30,
            distributed_executor_backend=args.distributed_executor_backend,
        )
        for name, is_async in MODES.items()
    }
    print(f"{'batch':>6}" + "".join(f"{name + ' tok/s':>14}" for name in MODES) + f"{'async / sync':>14}")
    for batch in args.batch:
        rates: dict[str, list[float]] = {name: [] for name in MODES}
        for _ in range(args.rounds + 1):
            for name, llm in llms.items():
                rates[name].append(tokens_per_s(llm, batch, args.output_len))
        middle = {name: statistics.median(rate[1:]) for name, rate in rates.items()}  # the first warms up
        ratio = middle["async"] / middle["sync"]
        print(f"{batch:>6}" + "".join(f"{rate:>14.1f}" for rate in middle.values()) + f"{ratio:>14.3f}", flush=True)
    for llm in llms.values():
        llm.shutdown()


if __name__ == "__main__":
    main()
