"""What an answer is made of, in the order it was written: text, reasoning, calls."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Union


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Reasoning(NamedTuple):
    """Text the model wrote for itself."""

    text: str


class CallStart(NamedTuple):
    """A call begins. `id` is the model's own, where its format has ids."""

    index: int
    name: str
    id: str | None = None


class CallArguments(NamedTuple):
    """More of a call's arguments: pieces of one JSON object."""

    index: int
    text: str


class CallEnd(NamedTuple):
    """A call is over. Not complete: its text broke off or went wrong; its arguments are the beginning of an object."""

    index: int
    complete: bool


Piece = Union[Content, Reasoning, CallStart, CallArguments, CallEnd]  # noqa: UP007 (evaluated at run time)


@dataclass
class Call:
    """One call: `arguments` is the text of a JSON object, or of the beginning of one if it is not complete."""

    name: str
    arguments: str = ""
    id: str | None = None
    complete: bool = False

    def parsed_arguments(self) -> dict:
        """Raises ValueError when they are not complete."""
        return json.loads(self.arguments)


@dataclass
class Answer:
    """A whole answer, of its pieces."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Answer:
        answer = cls()
        for piece in pieces:
            answer.add(piece)
        return answer

    def add(self, piece: Piece) -> None:
        if isinstance(piece, Content):
            self.content += piece.text
        elif isinstance(piece, Reasoning):
            self.reasoning += piece.text
        elif isinstance(piece, CallStart):
            self.calls.append(Call(piece.name, id=piece.id))
        elif isinstance(piece, CallArguments):
            self.calls[piece.index].arguments += piece.text
        else:
            self.calls[piece.index].complete = piece.complete
