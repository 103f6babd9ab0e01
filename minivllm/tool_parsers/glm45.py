"""GLM 4.5 to 4.7: <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>."""

from __future__ import annotations

from minivllm.tool_parsers.abstract import MAX_NAME_CHARS, Malformed, TaggedFormat
from minivllm.tool_parsers.xml_calls import TaggedToolParser
from minivllm.utils.text_source import Reading

BEGIN, END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


class Glm45ToolParser(TaggedToolParser):
    needs_special_tokens = True
    tagged_format = TaggedFormat(
        begin=BEGIN,
        name_end="\n",
        key=KEY,
        value=f"{KEY_END}\n{VALUE}",
        value_end=f"{VALUE_END}\n",
        arguments_end="",
        end=END,
        trigger=BEGIN,
    )

    def read(self) -> Reading[None]:
        while (yield from self.source.until(BEGIN, emit=self.content))[1]:
            yield from self.attempt(self._call(), before=BEGIN)

    def _call(self) -> Reading[None]:
        yield from self.source.spaces()
        name, marker = yield from self.source.until("\n", KEY, END, limit=MAX_NAME_CHARS)
        if marker is None:
            raise Malformed
        self.open_call(name.strip())
        while marker != END:
            if marker != KEY:
                yield from self.source.spaces()
                marker = yield from self.expect(KEY, END)
                continue
            key, found = yield from self.source.until(KEY_END, limit=MAX_NAME_CHARS)
            if found is None:
                raise Malformed
            yield from self.source.spaces()
            yield from self.expect(VALUE)
            value, found = yield from self.source.until(VALUE_END)
            if found is None:
                raise Malformed
            self.argument(key.strip(), value)
            marker = None
        self.close_call()
