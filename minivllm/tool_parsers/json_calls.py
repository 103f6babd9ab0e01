"""The engine of all formats whose calls are JSON objects: {"name": …, "arguments": {…}}, one or in a list."""

from __future__ import annotations

from minivllm.tool_parsers.abstract import Malformed, ToolParser
from minivllm.tool_parsers.json_reader import json_string, json_value
from minivllm.utils.text_source import Reading

ARGUMENTS = ("arguments", "parameters")


class JsonToolParser(ToolParser):
    """What reads calls as JSON objects. Keys come in any order; those nobody knows are passed over.

    Arguments are handed on as they come if the name stands before them, and when they are known to be a call's if not.
    """

    # Whether a name alone makes a call, of a function without arguments; without marks around it, it does not.
    name_is_enough = True

    def call_object(self) -> Reading[None]:
        """Read one call.

        Raises:
            Malformed: it is none, or not any more.
        """
        yield from self.expect("{")
        kept: list[str] = []  # arguments that stand before the name
        name: str | None = None
        begun = False
        while True:
            yield from self.source.spaces()
            key = yield from json_string(self.source)
            yield from self.source.spaces()
            yield from self.expect(":")
            yield from self.source.spaces()
            if key == "name" and name is None:
                name = yield from json_string(self.source)
                if self.name_is_enough:
                    self.name(name)
            elif key in ARGUMENTS and not begun and not kept:
                if (yield from self.source.peek()) != "{":
                    raise Malformed
                if name is not None:
                    self.name(name)
                    self.begin()
                    begun = True
                yield from json_value(self.source, self.arguments if begun else kept.append)
                if begun:
                    self.end()  # nothing that is still to come could change it
            else:
                yield from self._pass_over_value()
            yield from self.source.spaces()
            if (yield from self.expect(",", "}")) == "}":
                break
        if not begun:
            self._begin_late(name, kept)
        self.source.remark()

    def _pass_over_value(self) -> Reading[None]:
        """A number has no end of its own, so it is read by its characters."""
        if (yield from self.source.peek()) in (*"-0123456789",):
            yield from self.source.matching(lambda char: char in "-+.eE0123456789")
        else:
            yield from json_value(self.source, lambda text: None)

    def _begin_late(self, name: str | None, kept: list[str]) -> None:
        if name is None or not (kept or self.name_is_enough):
            raise Malformed
        self.name(name)
        self.begin()
        self.arguments("".join(kept) or "{}")
        self.end()

    def call_list(self, *, opened: bool = False) -> Reading[None]:
        """Read a JSON list of calls. opened: its bracket was read.

        Raises:
            Malformed: it is none, or not any more.
        """
        if not opened:
            yield from self.expect("[")
        yield from self.source.spaces()
        while True:
            yield from self.call_object()
            yield from self.source.spaces()
            if (yield from self.expect(",", "]")) == "]":
                return
            yield from self.source.spaces()

    def one_or_list(self) -> Reading[None]:
        """Read a call, or a list of calls."""
        if (yield from self.source.peek()) == "[":
            yield from self.call_list()
        else:
            yield from self.call_object()

    def objects_with_separator(self, *separators: str) -> Reading[None]:
        """Read calls that stand one after another, perhaps with a separator between; the rest is left.

        Raises:
            Malformed: one is none, or not any more.
        """
        while True:
            yield from self.call_object()
            yield from self.source.spaces()
            yield from self.source.accept(*separators)
            yield from self.source.spaces()
            if (yield from self.source.peek()) != "{":
                return
