"""uvicorn's access log: its lines, made with less work, and without those of some paths.

Probes and scrapers fill a log and tell nothing.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from uvicorn.config import LOGGING_CONFIG
from uvicorn.logging import AccessFormatter


class WithoutPaths(logging.Filter):
    """Drops records of `uvicorn.access` whose path, without its query, is one of these."""

    def __init__(self, paths: frozenset[str]) -> None:
        super().__init__()
        self._paths = paths

    def filter(self, record: logging.LogRecord) -> bool:
        # uvicorn's arguments: client, method, path with query, HTTP version, status.
        if not isinstance(record.args, tuple) or len(record.args) != 5:
            return True
        return str(record.args[2]).partition("?")[0] not in self._paths


class PlainAccessFormatter(AccessFormatter):
    """uvicorn's lines. Where they have no colours, without its two copies of every record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        if self.use_colors:
            return super().formatMessage(record)
        client_addr, method, full_path, http_version, status = record.args
        return self._fmt % {
            **record.__dict__,
            "levelprefix": f"{record.levelname}:".ljust(9),
            "client_addr": client_addr,
            "request_line": f"{method} {full_path} HTTP/{http_version}",
            "status_code": self.get_status_code(int(status)),
        }


def log_config() -> dict[str, Any]:
    """uvicorn's own configuration, with our formatter."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["formatters"]["access"]["()"] = f"{__name__}.{PlainAccessFormatter.__name__}"
    return config


def read_paths(text: str | None) -> frozenset[str]:
    """The paths of --disable-access-log-for-endpoints."""
    return frozenset(path.strip() for path in (text or "").split(",") if path.strip())


def silence(text: str | None) -> None:
    """Keep the paths out of this process's access log."""
    if paths := read_paths(text):
        logging.getLogger("uvicorn.access").addFilter(WithoutPaths(paths))
