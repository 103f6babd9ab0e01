"""Small readings of text: sizes with suffixes, the nearest name to a misspelt one, errors on one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_SIZE = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*([kKmMgGtT])?(i?B|i)?")
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Read a whole number that may carry a suffix.

    1k and 1kB are 1,000; 1K, 1Ki and 1KiB are 1,024; so with M, G and T, where only a capital without B, or
    an i, means powers of 1,024: 4G = 4Gi = 4GiB, 4g = 4GB = 4,000,000,000.

    Raises:
        ValueError: it is no whole number.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2] and match[3] != "B"):
        raise ValueError(f"{text!r} is not a whole number, such as 4096, 32k or 4GiB")
    number, letter, unit = match.groups()
    binary = (unit or "").startswith("i") or (unit is None and (letter or "").isupper())
    size = float(number) * (1024 if binary else 1000) ** _POWER.get((letter or "").lower(), 0) if letter else number
    if float(size) != int(float(size)):
        raise ValueError(f"{text!r} is not a whole number")
    return int(size)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that looks most like this one, if any looks like it."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def one_line(message: object) -> str:
    """The message without line breaks or runs of blanks, as a log's last line wants it."""
    return " ".join(str(message).split())
