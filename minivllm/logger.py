"""Log lines of one shape: time, process, level, place, message. Never prompts, keys or outputs."""

from __future__ import annotations

import logging
import os
import sys

_FORMAT = "%(asctime)s %(process_title)s %(levelname)s [%(filename)s:%(lineno)d] %(message)s"
_ROOT = "minivllm"
_process_title = "Main"


class _AddProcessTitle(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.process_title = f"({_process_title} pid={os.getpid()})"
        return True


def init_logger(name: str) -> logging.Logger:
    """The logger of a module; configured by the first `configure` of the process."""
    return logging.getLogger(name)


def configure(process_title: str, level: str = "INFO") -> None:
    """Send this process's `minivllm` log lines to standard error, marked with `process_title`."""
    global _process_title
    _process_title = process_title
    root = logging.getLogger(_ROOT)
    root.setLevel(level.upper())
    root.propagate = False
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.addFilter(_AddProcessTitle())
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%m-%d %H:%M:%S"))
        root.addHandler(handler)
