"""DeepSeek V3, R1 and V3.1: calls between marks of their own, the arguments in a block of code (V3) or bare (V3.1)."""

from __future__ import annotations

from minivllm.tool_parsers.abstract import MAX_NAME_CHARS, CallFormat, Malformed, ToolParser
from minivllm.utils.text_source import Reading

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class DeepSeekV3ToolParser(ToolParser):
    needs_special_tokens = True
    call_format = CallFormat(
        f"{CALL_BEGIN}function{SEPARATOR}",
        "\n```json\n",
        f"\n```{CALL_END}",
        quoted=False,
        separator="\n",
        first=CALLS_BEGIN,
        last=CALLS_END,
        trigger=CALLS_BEGIN,
    )

    def read(self) -> Reading[None]:
        while (yield from self.source.until(CALLS_BEGIN, emit=self.content))[1]:
            yield from self.attempt(self._calls(), before=CALLS_BEGIN)

    def _calls(self) -> Reading[None]:
        while True:
            yield from self.source.spaces()
            if (yield from self.expect(CALL_BEGIN, CALLS_END)) == CALLS_END:
                return
            yield from self._call()
            yield from self.closing(CALL_END)

    def _call(self) -> Reading[None]:
        before, marker = yield from self.source.until(SEPARATOR, limit=MAX_NAME_CHARS)
        if marker is None:
            raise Malformed
        following = yield from self.source.peek()
        if not following:
            raise Malformed
        fenced = following != "{"
        if fenced:  # V3: the kind of tool, which is always "function", then its name
            name, marker = yield from self.source.until("\n", limit=MAX_NAME_CHARS)
            if marker is None:
                raise Malformed
            self.name(name.strip())
            yield from self.source.spaces()
            yield from self.expect("```json")
            yield from self.source.spaces()
        else:
            self.name(before.strip())
        yield from self.json_arguments()
        if fenced:
            yield from self.closing("```")
