"""Mistral: [TOOL_CALLS] and a JSON list; since tokenizer v11 [TOOL_CALLS]name[CALL_ID]id[ARGS]{…}, or less of it."""

from __future__ import annotations

import secrets
import string

from minivllm.tool_parsers.abstract import CallFormat, Malformed
from minivllm.tool_parsers.json_calls import JsonToolParser
from minivllm.utils.text_source import Reading

BEGIN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ID_CHARS = string.ascii_letters + string.digits


class MistralToolParser(JsonToolParser):
    needs_special_tokens = True
    call_format = CallFormat(
        '{"name": ', ', "arguments": ', "}", separator=", ", first=BEGIN + "[", last="]", trigger=BEGIN
    )

    def make_id(self) -> str:
        """Nine letters or digits: Mistral's templates refuse others."""
        return "".join(secrets.choice(_ID_CHARS) for _ in range(9))

    def read(self) -> Reading[None]:
        while (yield from self.source.until(BEGIN, emit=self.content))[1]:
            yield from self.attempt(self._calls(), before=BEGIN)

    def _calls(self) -> Reading[None]:
        yield from self.source.spaces()
        if (yield from self.source.peek()) in ("[", "{"):
            yield from self.one_or_list()
        else:
            yield from self._named_call()

    def _named_call(self) -> Reading[None]:
        name, id = (yield from self._word()), None
        if (yield from self.source.accept(CALL_ID)):
            id = yield from self._word()
        if not (yield from self.source.peek()):
            raise Malformed  # the name, or the id, may be cut
        self.name(name, id or None)
        yield from self.source.accept(ARGS)
        yield from self.source.spaces()
        yield from self.json_arguments()

    def _word(self) -> Reading[str]:
        return (yield from self.source.matching(lambda char: char not in "[{" and not char.isspace()))
