"""Requests to measure with: seeded, so that two runs ask for the same work."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

from minivllm.exceptions import ConfigError
from minivllm.utils.argparse_utils import number, size

DATASETS = ("random",)


@dataclass(frozen=True)
class BenchRequest:
    prompt_token_ids: list[int]
    output_len: int


def add_dataset_arguments(parser: argparse.ArgumentParser, *, input_len: int, output_len: int, num: int) -> None:
    """Which requests, and how many."""
    group = parser.add_argument_group("requests")
    group.add_argument("--dataset-name", choices=DATASETS, default="random", help="random: random token ids.")
    group.add_argument("--num-prompts", type=size, default=num, metavar="N", help="Requests to send.")
    group.add_argument(
        "--random-input-len", "--input-len", type=size, default=input_len, metavar="N", help="Tokens of a prompt."
    )
    group.add_argument(
        "--random-output-len", "--output-len", type=size, default=output_len, metavar="N", help="Tokens to generate."
    )
    group.add_argument(
        "--random-range-ratio", type=number, default=0.0, metavar="R",
        help="Spread of both lengths: each is drawn from [len * (1 - R), len * (1 + R)].",
    )  # fmt: skip
    group.add_argument(
        "--random-prefix-len", type=size, default=0, metavar="N",
        help="Tokens that all prompts begin with, beside their own.",
    )  # fmt: skip


def from_args(args: argparse.Namespace, vocab_size: int) -> list[BenchRequest]:
    """The requests the arguments describe; drawn with `args.seed`.

    Raises:
        ConfigError: a number makes no sense.
    """
    for name in ("num_prompts", "random_input_len", "random_output_len"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name}={getattr(args, name)} must be at least 1")
    if not 0 <= args.random_range_ratio < 1:
        raise ConfigError(f"random_range_ratio={args.random_range_ratio} must be at least 0 and below 1")
    return random_requests(
        args.num_prompts,
        input_len=args.random_input_len,
        output_len=args.random_output_len,
        range_ratio=args.random_range_ratio,
        prefix_len=args.random_prefix_len,
        vocab_size=vocab_size,
        seed=args.seed,
    )


def random_requests(
    num: int,
    *,
    input_len: int,
    output_len: int,
    vocab_size: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[BenchRequest]:
    """Prompts of random token ids in [0, vocab_size); lengths in tokens, each within range_ratio of its mean."""
    draw = random.Random(seed)
    prefix = draw.choices(range(vocab_size), k=prefix_len)
    return [
        BenchRequest(
            prefix + draw.choices(range(vocab_size), k=_length(draw, input_len, range_ratio)),
            _length(draw, output_len, range_ratio),
        )
        for _ in range(num)
    ]


def _length(draw: random.Random, mean: int, ratio: float) -> int:
    return draw.randint(max(1, int(mean * (1 - ratio))), max(1, int(mean * (1 + ratio))))
