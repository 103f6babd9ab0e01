"""Text that arrives in pieces, read by a generator as if it were whole.

A reader written over a TextSource cannot depend on where the pieces were cut: it sees characters, and waits (`yield`)
when those it must see are not there yet. Parsers of tool calls and of reasoning are such readers.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from functools import cache
from typing import Generic, TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]  # to be used with `yield from`; each bare yield waits for the next piece
Emit = Callable[[str], None]


class Malformed(Exception):
    """The text is not what its reader expects, or not any more."""


class TextSource:
    """The text, how far it has been read, and whether there is more to come."""

    def __init__(self) -> None:
        self._text = ""
        self._pos = 0
        self._mark: int | None = None
        self.ended = False

    # --- for who brings the text ---

    def push(self, text: str) -> None:
        """More of the text. What was read, and is not marked, is forgotten."""
        done = self._pos if self._mark is None else self._mark
        self._text = self._text[done:] + text
        self._pos -= done
        if self._mark is not None:
            self._mark = 0

    def end(self) -> None:
        """There is no more."""
        self.ended = True

    # --- for who reads it ---

    def mark(self) -> None:
        """Remember this place, so that `since_mark` can say what was read from here."""
        self._mark = self._pos

    def remark(self) -> None:
        """Move the mark here, if there is one."""
        if self._mark is not None:
            self._mark = self._pos

    def unmark(self) -> None:
        self._mark = None

    def since_mark(self) -> str:
        assert self._mark is not None
        return self._text[self._mark : self._pos]

    @property
    def unread(self) -> str:
        """What is there and was not read."""
        return self._text[self._pos :]

    @property
    def exhausted(self) -> bool:
        """Whether all of it was read, and no more comes."""
        return self.ended and self._pos == len(self._text)

    def peek(self, n: int = 1) -> Reading[str]:
        """The next n characters, fewer only at the end."""
        while len(self._text) - self._pos < n and not self.ended:
            yield
        return self._text[self._pos : self._pos + n]

    def skip(self, n: int) -> None:
        """Read n characters that `peek` has shown."""
        self._pos += n

    def accept(self, *literals: str) -> Reading[str | None]:
        """Read the literal that comes next, if one of these does, and say which. None may begin with another."""
        longest = max(map(len, literals))
        for n in range(1, longest + 1):
            seen = yield from self.peek(n)
            if seen in literals and len(seen) == n:
                self.skip(n)
                return seen
            if len(seen) < n or not any(literal.startswith(seen) for literal in literals):
                return None
        return None

    def spaces(self) -> Reading[str]:
        """Read white space, and say which."""
        return (yield from self.matching(str.isspace))

    def matching(self, belongs: Callable[[str], bool]) -> Reading[str]:
        """Read characters as long as they belong."""
        found: list[str] = []
        while True:
            end = self._pos
            while end < len(self._text) and belongs(self._text[end]):
                end += 1
            found.append(self._text[self._pos : end])
            self._pos = end
            if end < len(self._text) or self.ended:
                return "".join(found)
            yield

    def until(
        self, *markers: str, emit: Emit | None = None, limit: int | None = None
    ) -> Reading[tuple[str, str | None]]:
        """Read to the first of the markers and over it: the text before it, and the marker, None if the text ends.

        With `emit` the text goes there as it comes, as far as it cannot begin a marker, and "" is returned.
        limit: so many characters are read at most, and if there is no marker behind them, None is returned for it.
        No marker may begin with another.
        """
        if limit is not None:
            return (yield from self._until_within(limit, markers))
        pattern, first = _pattern(markers), frozenset(marker[0] for marker in markers)
        longest = max(map(len, markers))
        parts: list[str] = []
        emit = emit or parts.append
        while True:
            found = pattern.search(self._text, self._pos)
            if found is not None:
                if found.start() > self._pos:
                    emit(self._text[self._pos : found.start()])
                self._pos = found.end()
                return "".join(parts), found[0]
            end = len(self._text)
            if not self.ended:
                end -= _num_undecided(self._text[max(self._pos, end - longest + 1) :], markers, first)
            if end > self._pos:
                emit(self._text[self._pos : end])
                self._pos = end
            if self.ended:
                return "".join(parts), None
            yield

    def _until_within(self, limit: int, markers: tuple[str, ...]) -> Reading[tuple[str, str | None]]:
        pattern, longest = _pattern(markers), max(map(len, markers))
        while True:
            there = len(self._text) - self._pos
            found = pattern.search(self._text, self._pos)
            if found is not None and found.start() - self._pos <= limit:
                text, self._pos = self._text[self._pos : found.start()], found.end()
                return text, found[0]
            if there >= limit + longest or self.ended:
                text = self._text[self._pos : self._pos + limit]
                self._pos += len(text)
                return text, None
            yield


class TextReader(ABC, Generic[T]):
    """A reader of one text, and what it has found. Feed it the text as it comes, then finish.

    How the text is cut changes nothing.
    """

    def __init__(self) -> None:
        self.source = TextSource()
        self._found: list[T] = []  # and not handed on yet
        self._reading = self.read()
        self._over = False

    @abstractmethod
    def read(self) -> Reading[None]:
        """Read `self.source` to its end."""

    def feed(self, text: str) -> list[T]:
        """More of the text; what is found in it."""
        self.source.push(text)
        return self._go_on()

    def finish(self) -> list[T]:
        """The text is over; what that lets be found."""
        self.source.end()
        return self._go_on()

    def _go_on(self) -> list[T]:
        if not self._over:
            try:
                next(self._reading)
            except StopIteration:
                self._over = True
                self._at_end()
        found, self._found = self._found, []
        return found

    def _at_end(self) -> None:
        """All was read: the last chance to find something."""


@cache
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))


def _num_undecided(tail: str, markers: tuple[str, ...], first: frozenset[str]) -> int:
    """How many characters at the end may be the beginning of a marker."""
    for start, char in enumerate(tail):
        if char in first and any(marker.startswith(tail[start:]) for marker in markers):
            return len(tail) - start
    return 0
