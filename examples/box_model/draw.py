"""Small random things: names that nobody has, times, prices, numbers.

Owns the split by content: `is_held_out` says whether something may be trained on, for ever, from its text alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from random import Random
from typing import Any

from examples.box_model import words

HELD_OUT_ONE_IN = 10


def is_held_out(key: str) -> bool:
    """Whether the content named `key` is measured on and never trained on: a tenth is."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def until(held_out: bool, draw: Callable[[], tuple[Any, str]]) -> Any:
    """Draw (value, key) pairs until one is on the wanted side of the split, and return its value."""
    while True:
        value, key = draw()
        if is_held_out(key) == held_out:
            return value


def invented(rng: Random) -> str:
    """A name that nobody has, as "Torvelo"."""
    return "".join(rng.choices(words.SYLLABLES, k=rng.choice((2, 2, 3)))).capitalize()


def first_name(rng: Random) -> str:
    return rng.choice(words.GIRLS + words.BOYS)


def full_name(rng: Random) -> str:
    """A first name, or an invented one, and sometimes a surname."""
    name = first_name(rng) if rng.random() < 0.6 else invented(rng)
    return f"{name} {invented(rng)}" if rng.random() < 0.3 else name


def clock_time(rng: Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02}"


def money(rng: Random) -> str:
    return f"{rng.randint(1, 99)}.{rng.choice(('00', '25', '50', '75', '90', '99'))}"


def small(low: int, high: int) -> Callable[[Random], int]:
    return lambda rng: rng.randint(low, high)


def some_words(rng: Random, low: int, high: int) -> list[str]:
    return rng.choices(words.PLAIN_WORDS, k=rng.randint(low, high))
