"""What a GPU makes of minivllm, beside what it could: one command, one table, under eight minutes.

    python -m benchmarks.gpu [--only kernels decode-1B …] [--seconds 460]

Needs Python 3.12 with torch 2.11, triton 3.6, numpy, msgspec, psutil and tqdm; transformers only for its own
row, and what `pip install -e .` brings only for start-8B.
Ceilings are measured in the same run. Rows that would begin after `--seconds` are left out, and said to be. Exit status
2, loudly, without a GPU, with what would have been measured.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.clock import Ceilings, Clock
from minivllm.platforms.platform import cuda_why_not

if TYPE_CHECKING:
    from benchmarks.gpu.models import Row

PARTS = (
    "attention", "captured", "cuda-decode", "decode-8B", "start-8B", "decode-1B", "few-rows", "kernels",
    "sampling", "batch-invariant", "transformers",
)  # fmt: skip
_START_S = 100  # at most, from a command to its first token
_GRACE_S = 60  # what a row may last beyond --seconds before it is taken to hang


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=460)
    args = parser.parse_args()
    if (reason := cuda_why_not()) is not None:
        parts = ", ".join(part for part in PARTS if part in args.only)
        print(f"NOTHING WAS MEASURED: {reason}. On a GPU, in this order: {parts}", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    faulthandler.dump_traceback_later(args.seconds + _GRACE_S, exit=True)  # what hangs in a driver hears no signal

    from benchmarks.gpu import kernels, models, peers, start

    major, minor = torch.cuda.get_device_capability()
    print(
        f"{torch.cuda.get_device_name()} (sm_{major}{minor}), torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    clock = Clock("cuda")
    ceilings = Ceilings(clock)
    print(ceilings)

    def is_time_left() -> bool:
        return time.perf_counter() - begin < args.seconds

    def limit_s() -> float:
        return max(1.0, min(_START_S, args.seconds + _GRACE_S / 2 - (time.perf_counter() - begin)))

    # In the order of what is worth knowing.
    for part in (part for part in PARTS if part in args.only):
        if not is_time_left():
            print(f"\n{part}: not run: {args.seconds:.0f} seconds are over")
        elif part in ("attention", "captured", "few-rows", "kernels"):
            print(f"\n{'kernel':<76} {'us':>9} {'rate':>14} {'of ceiling':>10}")
            of_part = {
                "attention": kernels.attention_kernels, "captured": kernels.captured_kernels,
                "few-rows": kernels.few_rows_kernels, "kernels": kernels.other_kernels,
            }  # fmt: skip
            for kernel in of_part[part]():
                if not is_time_left():
                    print(f"{kernel.name:<76} not run: out of time")
                    continue
                result = kernels.measure(kernel, clock, ceilings)
                print(
                    f"{result.name:<76} {result.seconds * 1e6:9.1f} {result.rate:>14} {result.share:10.0%}",
                    flush=True,
                )
        elif part == "sampling":
            for batch in (1, 64, 256):
                show(models.sampling(128256, batch, "cuda", clock))
        elif part == "start-8B":
            print()
            gc.collect()
            torch.cuda.empty_cache()
            show(start.run("8B", models.SHAPES["8B"], limit_s=limit_s, device="cuda"))
        elif part == "cuda-decode":
            for name in ("8B", "1B"):
                make = partial(models.Model, models.SHAPES[name], max_model_len=32768)
                show(models.gain_of_cuda_decode(name, make))
        elif part == "batch-invariant":
            show(models.price_of_invariance("1B", partial(models.Model, models.SHAPES["1B"])))
        elif part == "transformers":
            show([peers.run("1B", models.SHAPES["1B"], batch=64, prompt_len=128, num_tokens=64)])
        else:
            decode(part.removeprefix("decode-"), ceilings, is_time_left)
    print(f"\n{time.perf_counter() - begin:.0f} s")
    return 0


def decode(name: str, ceilings: Ceilings, is_time_left: Callable[[], bool]) -> None:
    from benchmarks.gpu import models

    model = models.Model(models.SHAPES[name])
    print(f"\n{name}: {model.seconds_to_first_token:.1f} s in this process to its first token, weights made up")
    sizes = {"batches": (1, 8, 64, 256), "contexts": (1024, 8192), "prompts": (512, 2048, 8192)}
    show(models.run(name, model, ceilings, **sizes, is_time_left=is_time_left))
    model.close()


def show(rows: Iterable[Row]) -> None:
    for row in rows:
        print(f"{row.what:<62} {row.rate:>10} tokens/s {row.share:>6} of roofline   {row.note}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
