"""Qwen3-Coder: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>."""

from __future__ import annotations

from minivllm.tool_parsers.abstract import MAX_NAME_CHARS, Malformed, TaggedFormat
from minivllm.tool_parsers.xml_calls import TaggedToolParser
from minivllm.utils.text_source import Reading

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class Qwen3CoderToolParser(TaggedToolParser):
    needs_special_tokens = True
    tagged_format = TaggedFormat(
        begin=f"{BEGIN}\n{FUNCTION}",
        name_end=">\n",
        key=PARAMETER,
        value=">\n",
        value_end=f"\n{PARAMETER_END}\n",
        arguments_end=FUNCTION_END,
        end=f"\n{END}",
        trigger=BEGIN,
    )

    def read(self) -> Reading[None]:
        # The model leaves the outer mark out now and then.
        while (found := (yield from self.source.until(BEGIN, FUNCTION, emit=self.content)))[1]:
            if (yield from self.attempt(self._call(found[1] == FUNCTION), before=found[1])):
                yield from self.closing(END)

    def _call(self, opened: bool) -> Reading[None]:
        if not opened:
            yield from self.source.spaces()
            yield from self.expect(FUNCTION)
        self.open_call((yield from self._rest_of_tag()))
        while True:
            yield from self.source.spaces()
            if (yield from self.expect(PARAMETER, FUNCTION_END)) == FUNCTION_END:
                break
            name = yield from self._rest_of_tag()
            value, marker = yield from self.source.until(PARAMETER_END)
            if marker is None:
                raise Malformed
            self.argument(name, value.removeprefix("\n").removesuffix("\n"))
        self.close_call()

    def _rest_of_tag(self) -> Reading[str]:
        name, marker = yield from self.source.until(">", limit=MAX_NAME_CHARS)
        if marker is None or not name.strip():
            raise Malformed
        return name.strip()
