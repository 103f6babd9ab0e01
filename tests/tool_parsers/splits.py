"""One text, cut in every way: what a parser makes of it must be the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

from minivllm.tool_parsers.abstract import ToolParser
from minivllm.tool_parsers.pieces import Answer, CallArguments, CallEnd, CallStart, Piece

MAX_PAIRS_OF = 48  # places; in longer texts pairs are of every second, third … place


def cuts(text: str) -> Iterator[list[str]]:
    """Whole, character by character, cut at every place, and at every two places."""
    yield [text]
    yield list(text)
    for i in range(len(text) + 1):
        yield [text[:i], text[i:]]
    stride = -(-len(text) // MAX_PAIRS_OF) or 1
    for i, j in combinations(range(0, len(text) + 1, stride), 2):
        yield [text[:i], text[i:j], text[j:]]


def pieces_of(parser: ToolParser, parts: list[str]) -> list[Piece]:
    return [piece for part in parts for piece in parser.feed(part)] + parser.finish()


def check_order(pieces: list[Piece]) -> None:
    """start arguments* end of each call, in turn, nothing between."""
    open_call: int | None = None
    num_calls = 0
    for piece in pieces:
        if isinstance(piece, CallStart):
            assert open_call is None and piece.index == num_calls
            open_call, num_calls = piece.index, num_calls + 1
        elif isinstance(piece, (CallArguments, CallEnd)):
            assert piece.index == open_call
            open_call = None if isinstance(piece, CallEnd) else open_call
        else:
            assert open_call is None and piece.text
    assert open_call is None


def parse_every_way(make: Callable[[], ToolParser], text: str) -> Answer:
    """The answer, having seen that no way of cutting the text gives another."""
    whole = make().parse(text)
    for parts in cuts(text):
        pieces = pieces_of(make(), parts)
        check_order(pieces)
        assert Answer.of(pieces) == whole, parts
    return whole
