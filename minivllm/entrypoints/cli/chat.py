"""`minivllm chat`: a conversation with a running server."""

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
from minivllm.utils.argparse_utils import FlexibleArgumentParser


def make_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(prog="minivllm chat", description="Talk to a running server. /exit ends it.")
    add_client_arguments(parser)
    parser.add_argument("--system-prompt", metavar="TEXT", help="What the system's message says.")
    parser.add_argument("-q", "--quick", metavar="MESSAGE", help="Say this, print the answer, and end.")
    return parser


def run(args: Namespace) -> None:
    client = Client.from_args(args)
    history: list[dict[str, Any]] = []
    if args.system_prompt:
        history.append({"role": "system", "content": args.system_prompt})
    if args.quick is not None:
        say(client, history, args.quick, stats=args.stats)
        return
    print(f"{client.model} at {client.url}; /exit ends")
    for line in read_lines("> "):
        try:
            say(client, history, line, stats=args.stats)
        except ServerError as error:
            # The turn that failed is forgotten; the conversation goes on.
            del history[-1]
            print(f"({error})")


def say(client: Client, history: list[dict[str, Any]], text: str, *, stats: bool) -> None:
    """One turn: send the conversation with `text` at its end, print the answer, remember both."""
    history.append({"role": "user", "content": text})
    measured = Stats()
    answer = print_answer(client.stream("chat/completions", {"messages": history}, measured))
    history.append({"role": "assistant", "content": answer})
    if stats:
        print(f"[{measured}]")
