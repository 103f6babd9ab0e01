"""What a GPU makes of minivllm, beside what it could: one command, one table, under eight minutes.

    python -m benchmarks.gpu [--only kernels decode-1B …] [--seconds 460]

Needs Python 3.12 with torch 2.11, triton 3.6, numpy, msgspec, psutil and tqdm; transformers only for its own row. Ceilings
are measured in the same run. Parts that would begin after `--seconds` are left out, and said to be. Exit status 2, loudly, without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time

import torch

from minivllm.platforms.platform import cuda_why_not

PARTS = ("kernels", "sampling", "decode-1B", "decode-8B", "transformers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=460)
    args = parser.parse_args()
    if (reason := cuda_why_not()) is not None:
        print(f"NOTHING WAS MEASURED: {reason}", file=sys.stderr)
        return 2
    begin = time.perf_counter()

    from benchmarks.gpu import kernels, models, peers
    from benchmarks.gpu.clock import Ceilings, Clock

    major, minor = torch.cuda.get_device_capability()
    print(
        f"{torch.cuda.get_device_name()} (sm_{major}{minor}), torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    clock = Clock("cuda")
    ceilings = Ceilings(clock)
    print(ceilings)

    def is_time_left(part: str) -> bool:
        if part not in args.only:
            return False
        if time.perf_counter() - begin > args.seconds:
            print(f"{part} IS LEFT OUT: {args.seconds:.0f} seconds are over")
            return False
        return True

    if is_time_left("kernels"):
        print(f"\n{'kernel':<76} {'us':>9} {'rate':>14} {'of ceiling':>10}")
        for group in (kernels.attention_kernels, kernels.other_kernels):
            for kernel in group():
                result = kernels.measure(kernel, clock, ceilings)
                print(
                    f"{result.name:<76} {result.seconds * 1e6:9.1f} {result.rate:>14} {result.share:10.0%}",
                    flush=True,
                )
    if is_time_left("sampling"):
        for batch in (1, 64, 256):
            show(models.sampling(128256, batch, "cuda", clock))
    for name in models.SHAPES:
        if not is_time_left(f"decode-{name}"):
            continue
        model = models.Model(models.SHAPES[name])
        print(
            f"\n{name}: {model.seconds_to_first_token:.1f} s to the first token (imports apart, weights made up)"
        )
        show(
            models.run(
                name,
                model,
                ceilings,
                batches=(1, 8, 64, 256),
                contexts=(1024, 8192),
                prompts=(512, 2048, 8192),
            )
        )
        model.worker.shutdown()
        del model
        gc.collect()
        torch.cuda.empty_cache()
    if is_time_left("transformers"):
        show([peers.run("1B", models.SHAPES["1B"], batch=64, prompt_len=128, num_tokens=64)])
    print(f"\n{time.perf_counter() - begin:.0f} s")
    return 0


def show(rows: list) -> None:
    for row in rows:
        print(f"{row.what:<62} {row.rate:>10} tokens/s {row.share:>6} of roofline   {row.note}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
