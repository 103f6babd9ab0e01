"""`minivllm COMMAND …`: finds the command and runs it. A command's module is imported only when it is named.

Each module has `make_parser() -> ArgumentParser` and `run(args)`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

from minivllm.entrypoints.errors import exit_on_error
from minivllm.exceptions import ConfigError
from minivllm.utils.text import nearest
from minivllm.version import __version__

Commands = Mapping[str, tuple[str, str]]

# name -> module, one line of help
COMMANDS: Commands = {
    "serve": ("minivllm.entrypoints.cli.serve", "serve a model over the OpenAI API"),
    "chat": ("minivllm.entrypoints.cli.chat", "talk to a running server"),
    "complete": ("minivllm.entrypoints.cli.complete", "let a running server complete text"),
    "run-batch": ("minivllm.entrypoints.cli.run_batch", "answer a file of requests in OpenAI's batch format"),
    "bench": ("minivllm.entrypoints.cli.bench.main", "measure latency, throughput, or a running server"),
    "collect-env": ("minivllm.entrypoints.cli.collect_env", "print what to paste into a bug report"),
}
NOT_YET = ("launch", "download-kernels", "preload", "snapshot")


def main(argv: Sequence[str] | None = None) -> None:
    """The console script."""
    with exit_on_error():
        args = list(sys.argv[1:] if argv is None else argv)
        if args and args[0] in ("--version", "-v", "-V"):
            print(__version__)
        elif args and args[0] == "collect-env":
            from minivllm.entrypoints.cli import collect_env

            collect_env.main()
        else:
            dispatch(args, COMMANDS, "minivllm", NOT_YET)


def dispatch(args: list[str], commands: Commands, prog: str, not_yet: Sequence[str] = ()) -> None:
    """Run the command that the first argument names with the others, or print which there are.

    Raises:
        ConfigError: there is no such command; the nearest is named.
    """
    if not args or args[0] in ("-h", "--help"):
        print(overview(commands, prog), end="")
        return
    name = args[0]
    if name in not_yet:
        raise ConfigError(f"{prog} {name} is a command of vLLM that minivllm does not support yet")
    if name not in commands:
        guess = nearest(name, commands)
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(commands)}"
        raise ConfigError(f"{prog} has no command {name!r}; {hint}")
    module = importlib.import_module(commands[name][0])
    if hasattr(module, "COMMANDS"):
        dispatch(args[1:], module.COMMANDS, f"{prog} {name}", module.NOT_YET)
    else:
        module.run(module.make_parser().parse_args(args[1:]))


def overview(commands: Commands, prog: str) -> str:
    """What bare `--help` prints."""
    lines = [f"  {name:<13}{text}" for name, (_, text) in commands.items()]
    tail = [f"{prog} COMMAND --help tells more."]
    if prog == "minivllm":
        tail.append("minivllm --version prints the version.")
    return "\n".join([f"usage: {prog} COMMAND [arguments]", "", *lines, "", *tail, ""])


if __name__ == "__main__":
    main()
