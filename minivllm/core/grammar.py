"""What the scheduler needs of grammars: when a request may start, where it stands, what its next token may be.

The scheduler is given a `Grammars`; how one is compiled and followed is not its business.
"""

from __future__ import annotations

from typing import Protocol

from minivllm.messages.engine import EngineCoreRequest


class GrammarState(Protocol):
    """One request's place in its grammar, which follows from its output tokens alone."""

    @property
    def is_ready(self) -> bool:
        """Tokens may be sampled, or never will be. Until then nothing else may be asked."""

    @property
    def error(self) -> str | None:
        """Why the request cannot go on."""

    @property
    def error_param(self) -> str | None:
        """The request's field whose fault that is; None if it is ours."""

    @property
    def is_constraining(self) -> bool:
        """The next token must be one of its mask."""

    @property
    def is_complete(self) -> bool:
        """Nothing may follow: the answer is done."""

    def accept(self, token_id: int) -> None:
        """Go on by one output token."""


class Grammars(Protocol):
    """Where grammars come from."""

    def start(self, request: EngineCoreRequest) -> GrammarState:
        """Begin with a request's grammar; returns at once."""

    def bitmask(self, states: list) -> bytes:
        """The masks of states that are constraining, one row each. One that fails has its `error` set."""
