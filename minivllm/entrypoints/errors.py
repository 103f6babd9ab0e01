"""How a program of ours ends when it cannot go on: one clear last line, and an exit code that says whose fault it was.

The codes are those of `exceptions`: 2 an argument, 3 a file of the model, 1 anything else, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from minivllm.exceptions import MinivllmError
from minivllm.logger import init_logger
from minivllm.utils.text import one_line

logger = init_logger(__name__)

INTERRUPTED = 130  # 128 + SIGINT, as shells count


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with one line for our own errors; for others with the traceback, then one line.

    As a decorator or in a `with`, around all that a program does. A traceback of our own errors is shown only at log
    level DEBUG.
    """
    _open_standard_streams()
    try:
        yield
    except MinivllmError as error:
        logger.debug("the error came from here", exc_info=True)
        exit_with(str(error), getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        exit_with("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left, as in `minivllm … | head`. The rest must not be flushed into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        exit_with(f"internal error: {type(error).__name__}: {error}; please report it, with minivllm collect-env", 1)


def _open_standard_streams() -> None:
    """Open /dev/null where a parent has closed descriptor 0, 1 or 2: the next socket would take its number."""
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it is fd: the lowest that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))


def exit_with(message: str, code: int) -> NoReturn:
    """Print `minivllm: error: message` as the last line and raise SystemExit."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"minivllm: error: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(code)
