"""Log lines of one shape: time, process, level, place, message. Never prompts, keys or outputs."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys

from minivllm import envs
from minivllm.exceptions import ConfigError

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


def log_config_path(given: str | None) -> str | None:
    """The file of --log-config-file, or of the environment, ours before vLLM's."""
    return given or envs.get("MINIVLLM_LOGGING_CONFIG_PATH") or envs.get("VLLM_LOGGING_CONFIG_PATH")


def configure(process_title: str, level: str = "INFO", *, config_file: str | None = None) -> None:
    """Send this process's `minivllm` log lines to standard error, marked with `process_title`.

    config_file: JSON for logging.config.dictConfig, which then decides alone, level included.

    Raises:
        ConfigError: it cannot be read, or is no such configuration.
    """
    global _process_title
    _process_title = process_title
    if (path := log_config_path(config_file)) is not None:
        try:
            with open(path, encoding="utf-8") as file:
                logging.config.dictConfig(json.load(file))
        except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
            raise ConfigError(f"--log-config-file {path} cannot be used: {error}") from error
        return
    root = logging.getLogger(_ROOT)
    root.setLevel(level.upper())
    root.propagate = False
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.addFilter(_AddProcessTitle())
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%m-%d %H:%M:%S"))
        root.addHandler(handler)
