"""Kimi K2: calls between marks of their own, each with an id that holds its name: functions.get_weather:0."""

from __future__ import annotations

from minivllm.tool_parsers.abstract import CallFormat, Malformed, ToolParser
from minivllm.utils.text_source import Reading

SECTION_BEGINS = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
SECTION_ENDS = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
CALL_BEGIN, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
MAX_ID_CHARS = 256


class KimiK2ToolParser(ToolParser):
    needs_special_tokens = True
    call_format = CallFormat(
        CALL_BEGIN + "functions.",
        ARGUMENTS,
        CALL_END,
        quoted=False,
        first=SECTION_BEGINS[0],
        last=SECTION_ENDS[0],
        trigger=SECTION_BEGINS[0],
        number=":[0-9]{1,3}",
    )

    def read(self) -> Reading[None]:
        while (found := (yield from self.source.until(*SECTION_BEGINS, emit=self.content)))[1]:
            yield from self.attempt(self._calls(), before=found[1])

    def _calls(self) -> Reading[None]:
        while True:
            yield from self.source.spaces()
            if (yield from self.expect(CALL_BEGIN, *SECTION_ENDS)) in SECTION_ENDS:
                return
            yield from self._call()
            yield from self.closing(CALL_END)

    def _call(self) -> Reading[None]:
        id, marker = yield from self.source.until(ARGUMENTS, limit=MAX_ID_CHARS)
        if marker is None:
            raise Malformed
        id = id.strip()
        self.name(id.rsplit(":", 1)[0].removeprefix("functions."), id)
        yield from self.source.spaces()
        yield from self.json_arguments()
