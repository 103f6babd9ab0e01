"""`minivllm serve MODEL`: the OpenAI server, as `python -m minivllm.entrypoints.openai.api_server` starts it."""

from __future__ import annotations

from argparse import Namespace

from minivllm.entrypoints.openai.cli_args import make_arg_parser, validate_args
from minivllm.logger import configure
from minivllm.utils.argparse_utils import FlexibleArgumentParser


def make_parser() -> FlexibleArgumentParser:
    return make_arg_parser()


def run(args: Namespace) -> None:
    validate_args(args)
    configure("APIServer", args.log_level, config_file=args.log_config_file)
    from minivllm.entrypoints.openai import api_server  # after --help and wrong arguments are dealt with

    api_server.run(args)
