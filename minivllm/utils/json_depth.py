"""How deep JSON is nested, for who must not recurse into what a client wrote."""

from __future__ import annotations

from typing import Any


def is_deeper(value: Any, max_levels: int) -> bool:
    """Whether objects and arrays stand inside each other on more than `max_levels` levels. Found without recursion."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(max_levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return bool(level)
