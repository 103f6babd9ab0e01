"""`minivllm complete`: text for a running server to continue."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from minivllm.entrypoints.cli.client import (
    Client,
    ServerError,
    Stats,
    add_client_arguments,
    print_answer,
    read_lines,
)
from minivllm.utils.argparse_utils import FlexibleArgumentParser, size


def make_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(
        prog="minivllm complete", description="Let a running server complete text. /exit ends it."
    )
    add_client_arguments(parser)
    parser.add_argument("--max-tokens", type=size, metavar="N", help="Tokens to add at most; default: the server's.")
    parser.add_argument("-q", "--quick", metavar="PROMPT", help="Complete this, and end.")
    return parser


def run(args: Namespace) -> None:
    client = Client.from_args(args)
    options = {} if args.max_tokens is None else {"max_tokens": args.max_tokens}
    if args.quick is not None:
        complete(client, args.quick, options, stats=args.stats)
        return
    print(f"{client.model} at {client.url}; /exit ends")
    for line in read_lines("> "):
        try:
            complete(client, line, options, stats=args.stats)
        except ServerError as error:
            print(f"({error})")


def complete(client: Client, prompt: str, options: dict[str, Any], *, stats: bool) -> None:
    """Print what follows the prompt."""
    measured = Stats()
    print_answer(client.stream("completions", {"prompt": prompt, **options}, measured))
    if stats:
        print(f"[{measured}]")
