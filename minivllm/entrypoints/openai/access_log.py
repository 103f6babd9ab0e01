"""uvicorn's access log without the lines of some paths: probes and scrapers fill a log and tell nothing."""

from __future__ import annotations

import logging


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


def read_paths(text: str | None) -> frozenset[str]:
    """The paths of --disable-access-log-for-endpoints."""
    return frozenset(path.strip() for path in (text or "").split(",") if path.strip())


def silence(text: str | None) -> None:
    """Keep the paths out of this process's access log."""
    if paths := read_paths(text):
        logging.getLogger("uvicorn.access").addFilter(WithoutPaths(paths))
