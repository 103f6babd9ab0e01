"""`minivllm bench throughput`: how much work the engine gets done when it has all of it at once."""

from __future__ import annotations

import time
from argparse import Namespace
from typing import Any

from minivllm.engine.arg_utils import EngineArgs
from minivllm.entrypoints.cli.bench import datasets
from minivllm.entrypoints.cli.bench.offline import check_lengths, params_for, quiet_llm
from minivllm.entrypoints.cli.bench.report import machine, save
from minivllm.entrypoints.openai.cli_args import refuse_option
from minivllm.outputs import RequestOutput
from minivllm.utils.argparse_utils import FlexibleArgumentParser, size


def make_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(
        prog="minivllm bench throughput", description="Measure offline throughput.", refuse=refuse_option
    )
    parser.add_argument("--backend", choices=("vllm",), default="vllm", help="The engine: this one.")
    parser.add_argument("--n", type=size, default=1, metavar="N", help="Answers to each prompt.")
    parser.add_argument("--num-warmups", type=size, default=0, metavar="N", help="Requests before measuring.")
    parser.add_argument("--disable-detokenize", action="store_true", help="Leave the output as token ids.")
    parser.add_argument("--output-json", metavar="FILE", help="Save the result there.")
    datasets.add_dataset_arguments(parser, input_len=1024, output_len=128, num=1000)
    return EngineArgs.add_cli_args(parser)


def run(args: Namespace) -> None:
    with quiet_llm(args) as llm:
        vocab_size = llm.llm_engine.config.hf_config.vocab_size
        requests = datasets.from_args(args, vocab_size)
        longest = max(requests, key=lambda request: len(request.prompt_token_ids) + request.output_len)
        check_lengths(llm, len(longest.prompt_token_ids), longest.output_len)
        detokenize = not args.disable_detokenize
        params = [params_for(request.output_len, n=args.n, detokenize=detokenize) for request in requests]
        prompts = [request.prompt_token_ids for request in requests]
        if args.num_warmups:
            warm = datasets.random_requests(
                args.num_warmups,
                input_len=args.random_input_len,
                output_len=args.random_output_len,
                vocab_size=vocab_size,
                seed=args.seed + 1,
            )
            llm.generate([request.prompt_token_ids for request in warm], params[0], use_tqdm=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        elapsed = time.perf_counter() - start
    result = measure(outputs, elapsed)
    report(result)
    if args.output_json:
        save(args.output_json, {**result, "machine": machine()})


def measure(outputs: list[RequestOutput], elapsed_s: float) -> dict[str, Any]:
    """Requests and tokens per second."""
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_output_tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    return {
        "elapsed_time": elapsed_s,
        "num_requests": len(outputs),
        "total_num_prompt_tokens": num_prompt_tokens,
        "total_num_output_tokens": num_output_tokens,
        "requests_per_second": len(outputs) / elapsed_s,
        "tokens_per_second": (num_prompt_tokens + num_output_tokens) / elapsed_s,
        "output_tokens_per_second": num_output_tokens / elapsed_s,
    }


def report(result: dict[str, Any]) -> None:
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {result['total_num_prompt_tokens']}")
    print(f"Total num output tokens:  {result['total_num_output_tokens']}")
