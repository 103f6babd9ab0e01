"""`minivllm bench latency`: how long one batch takes from prompt to last token."""

from __future__ import annotations

import time
from argparse import Namespace

from tqdm import tqdm

from minivllm.engine.arg_utils import EngineArgs
from minivllm.entrypoints.cli.bench.datasets import random_requests
from minivllm.entrypoints.cli.bench.offline import check_lengths, params_for, quiet_llm
from minivllm.entrypoints.cli.bench.report import machine, percentile, save
from minivllm.entrypoints.openai.cli_args import refuse_option
from minivllm.exceptions import ConfigError
from minivllm.utils.argparse_utils import FlexibleArgumentParser, size

PERCENTS = (10, 25, 50, 75, 90, 99)


def make_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(
        prog="minivllm bench latency", description="Measure the latency of one batch.", refuse=refuse_option
    )
    parser.add_argument("--input-len", type=size, default=32, metavar="N", help="Tokens of each prompt.")
    parser.add_argument("--output-len", type=size, default=128, metavar="N", help="Tokens to generate.")
    parser.add_argument("--batch-size", type=size, default=8, metavar="N", help="Requests in the batch.")
    parser.add_argument("--n", type=size, default=1, metavar="N", help="Answers to each prompt.")
    parser.add_argument("--num-iters-warmup", type=size, default=10, metavar="N", help="Batches before measuring.")
    parser.add_argument("--num-iters", type=size, default=30, metavar="N", help="Batches measured.")
    parser.add_argument("--disable-detokenize", action="store_true", help="Leave the output as token ids.")
    parser.add_argument("--output-json", metavar="FILE", help="Save the result there.")
    EngineArgs.add_cli_args(parser)
    # Equal batches would find their prompts in the cache, and measure no prefill from the second on.
    parser.set_defaults(enable_prefix_caching=False)
    return parser


def run(args: Namespace) -> None:
    if args.num_iters < 1 or args.batch_size < 1:
        raise ConfigError("num_iters and batch_size must be at least 1")
    with quiet_llm(args) as llm:
        check_lengths(llm, args.input_len, args.output_len)
        requests = random_requests(
            args.batch_size,
            input_len=args.input_len,
            output_len=args.output_len,
            vocab_size=llm.llm_engine.config.hf_config.vocab_size,
            seed=args.seed,
        )
        prompts = [request.prompt_token_ids for request in requests]
        params = params_for(args.output_len, n=args.n, detokenize=not args.disable_detokenize)

        def one_batch() -> float:
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - start

        for _ in tqdm(range(args.num_iters_warmup), desc="Warming up"):
            one_batch()
        latencies = [one_batch() for _ in tqdm(range(args.num_iters), desc="Measuring")]
    report(latencies, args.output_json)


def report(latencies: list[float], output_json: str | None) -> None:
    """Print the latencies' average and percentiles, in seconds; save them if asked."""
    average = sum(latencies) / len(latencies)
    percentiles = {percent: percentile(latencies, percent) for percent in PERCENTS}
    print(f"Avg latency: {average} seconds")
    for percent, latency in percentiles.items():
        print(f"{percent}% percentile latency: {latency} seconds")
    if output_json:
        save(
            output_json,
            {
                "avg_latency": average,
                "latencies": latencies,
                "percentiles": {str(percent): latency for percent, latency in percentiles.items()},
                "machine": machine(),
            },
        )
