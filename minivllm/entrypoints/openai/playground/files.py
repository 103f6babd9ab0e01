"""The page's own files, as they lie in `static/`: a table made at import, so a request never names a path on disk."""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

PAGE = "index.html"
PREFIX = "/playground/"
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


class PageFile(NamedTuple):
    content: bytes
    media_type: str


def _read_all() -> dict[str, PageFile]:
    static = files(__package__).joinpath("static")
    return {
        file.name: PageFile(file.read_bytes(), _MEDIA_TYPES[file.name.rpartition(".")[2]]) for file in static.iterdir()
    }


_FILES = _read_all()
# What a browser asks for before its user has given a key.
OPEN_PATHS = frozenset({"/", *(PREFIX + name for name in _FILES)})


def page_file(name: str) -> PageFile | None:
    return _FILES.get(name)
