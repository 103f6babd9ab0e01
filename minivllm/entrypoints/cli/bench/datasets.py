"""Requests to measure with: seeded, so that two runs ask for the same work."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minivllm.exceptions import ConfigError
from minivllm.utils.argparse_utils import number, size

DATASETS = ("random", "prefix_repetition")
SHAREGPT = "sharegpt"
# Of conversations: those that are too short to tell anything, or too long to compare, are left out, as in vLLM.
MIN_TOKENS, MAX_PROMPT_TOKENS, MAX_TOKENS = 4, 1024, 2048


@dataclass(frozen=True)
class BenchRequest:
    """A prompt as token ids or, from a file of conversations, as text."""

    prompt_token_ids: list[int]
    output_len: int
    text: str | None = None
    num_text_tokens: int = 0

    @property
    def prompt(self) -> list[int] | str:
        return self.prompt_token_ids if self.text is None else self.text

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_token_ids) or self.num_text_tokens


def add_dataset_arguments(
    parser: argparse.ArgumentParser, *, input_len: int, output_len: int, num: int, texts: bool = False
) -> None:
    """Which requests, and how many. texts: offer those that are text."""
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--dataset-name", choices=(*DATASETS, SHAREGPT) if texts else DATASETS, default="random",
        help="random: random token ids; prefix_repetition: some prefixes, each with many suffixes"
        + ("; sharegpt: the first turns of conversations in a file." if texts else "."),
    )  # fmt: skip
    if texts:
        group.add_argument("--dataset-path", metavar="FILE", help="sharegpt: the JSON file.")
        group.add_argument(
            "--sharegpt-output-len", type=size, metavar="N", help="sharegpt: tokens to generate; default: the reply's."
        )
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
    for name, default, text in (
        ("prefix-len", 256, "tokens of a prefix"), ("suffix-len", 256, "tokens behind it"),
        ("num-prefixes", 10, "prefixes"), ("output-len", 128, "tokens to generate"),
    ):  # fmt: skip
        option = f"--prefix-repetition-{name}"
        group.add_argument(option, type=size, default=default, metavar="N", help=f"prefix_repetition: {text}.")


def from_args(args: argparse.Namespace, vocab_size: int) -> list[BenchRequest]:
    """The requests the arguments describe; drawn with `args.seed`.

    Raises:
        ConfigError: a number makes no sense.
    """
    repeated = [f"prefix_repetition_{name}" for name in ("prefix_len", "suffix_len", "num_prefixes", "output_len")]
    for name in ("num_prompts", "random_input_len", "random_output_len", *repeated):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name}={getattr(args, name)} must be at least 1")
    if not 0 <= args.random_range_ratio < 1:
        raise ConfigError(f"random_range_ratio={args.random_range_ratio} must be at least 0 and below 1")
    if args.dataset_name == "prefix_repetition":
        return prefix_repetition_requests(
            args.num_prompts,
            prefix_len=args.prefix_repetition_prefix_len,
            suffix_len=args.prefix_repetition_suffix_len,
            num_prefixes=args.prefix_repetition_num_prefixes,
            output_len=args.prefix_repetition_output_len,
            vocab_size=vocab_size,
            seed=args.seed,
        )
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


def prefix_repetition_requests(
    num: int, *, prefix_len: int, suffix_len: int, num_prefixes: int, output_len: int, vocab_size: int, seed: int = 0
) -> list[BenchRequest]:
    """Each prefix as often as the others, in a drawn order, with random suffixes: what a prefix cache is for."""
    draw = random.Random(seed)
    prefixes = [draw.choices(range(vocab_size), k=prefix_len) for _ in range(num_prefixes)]
    requests = [
        BenchRequest(prefixes[i % num_prefixes] + draw.choices(range(vocab_size), k=suffix_len), output_len)
        for i in range(num)
    ]
    draw.shuffle(requests)
    return requests


def sharegpt_requests(
    path: str | None, num: int, *, output_len: int | None, count_tokens: Callable[[str], int], seed: int = 0
) -> list[BenchRequest]:
    """The first question of `num` drawn conversations; output_len: None asks for as many tokens as its answer has.

    Raises:
        ConfigError: the file cannot be read, has another form, or holds too few that fit.
    """
    if path is None:
        raise ConfigError("--dataset-name sharegpt needs --dataset-path")
    try:
        conversations = json.loads(Path(path).read_text(encoding="utf-8"))
        turns = [[turn["value"] for turn in c["conversations"][:2]] for c in conversations]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"--dataset-path {path} is no file of conversations as ShareGPT has them: {error}") from error
    turns = [pair for pair in turns if len(pair) == 2]
    random.Random(seed).shuffle(turns)
    requests: list[BenchRequest] = []
    for question, answer in turns:
        if len(requests) == num:
            break
        num_prompt, num_output = count_tokens(question), output_len or count_tokens(answer)
        if min(num_prompt, num_output) < MIN_TOKENS or num_prompt > MAX_PROMPT_TOKENS:
            continue
        if num_prompt + num_output <= MAX_TOKENS:
            requests.append(BenchRequest([], num_output, question, num_prompt))
    if len(requests) < num:
        raise ConfigError(f"--dataset-path {path} has {len(requests)} conversations that fit; lower --num-prompts")
    return requests


def _length(draw: random.Random, mean: int, ratio: float) -> int:
    return draw.randint(max(1, int(mean * (1 - ratio))), max(1, int(mean * (1 + ratio))))
