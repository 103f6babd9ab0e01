"""How the served model writes its answers, and one answer taken apart: content, reasoning, calls.

Every route whose answers have parts asks here: `AnswerFormat.plan` before the engine is asked, `AnswerPlan.parser` for
each answer's text.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from minivllm.entrypoints.tool_use import (
    NO_TOOLS,
    ToolUse,
    form_of_calls,
    form_of_free_calls,
    form_of_free_tagged_calls,
)
from minivllm.exceptions import ConfigError, RequestError
from minivllm.logger import init_logger
from minivllm.reasoning.abstract import ReasoningParser
from minivllm.sampling_params import StructuredOutputsParams
from minivllm.tool_parsers.abstract import ToolParser
from minivllm.tool_parsers.forced import ArgumentsToolParser, JsonListToolParser
from minivllm.tool_parsers.pieces import CallEnd, CallStart, Content, Piece, Reasoning
from minivllm.tool_parsers.registry import TOOL_PARSERS

logger = init_logger(__name__)

StrictLevel = Literal["auto", "function", "parameter"]


@dataclass(frozen=True)
class AnswerFormat:
    """Of the server: which parsers its model's answers need. auto: whether a model may call tools when it likes.

    strict_level: how far a grammar holds the calls that it makes when it likes: "auto", if a function says `strict`;
    "function", always to the functions there are; "parameter", always to their schemas too.

    Raises (on construction):
        ConfigError: the level needs a grammar that the tool parser has not.
    """

    tool_parser: type[ToolParser] | None = None
    reasoning_parser: type[ReasoningParser] | None = None
    auto_tool_choice: bool = False
    strict_level: StrictLevel = "auto"

    def __post_init__(self) -> None:
        if self.strict_level != "auto" and not self.has_triggered_grammar:
            raise ConfigError(
                f"--tool-strict-level {self.strict_level} needs a --tool-call-parser whose calls begin with a mark of "
                "their own (hermes, mistral, deepseek_v3, granite, phi4_mini_json, kimi_k2, qwen3_coder, glm45)"
            )

    @property
    def has_triggered_grammar(self) -> bool:
        """A grammar can hold a call that the model begins by itself."""
        parser = self.tool_parser
        if parser is None:
            return False
        return parser.tagged_format is not None or bool(parser.call_format and parser.call_format.trigger)

    def plan(self, use: ToolUse = NO_TOOLS, *, include_reasoning: bool = True) -> AnswerPlan:
        """How answers to one request are read.

        Raises:
            RequestError: tools are to be called when the model likes, and the server does not know how it would.
        """
        if use.choice == "auto" and not (self.auto_tool_choice and self.tool_parser):
            raise RequestError(
                'tool_choice="auto" needs a server with --enable-auto-tool-choice and --tool-call-parser; '
                'say "none" or "required", or name a function',
                param="tool_choice",
            )
        return AnswerPlan(self, use, include_reasoning)


@dataclass(frozen=True)
class AnswerPlan:
    """Of one request."""

    format: AnswerFormat
    use: ToolUse = NO_TOOLS
    include_reasoning: bool = True

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the text must be detokenized with its special tokens: they may be what is to be parsed."""
        parsers = [self.format.reasoning_parser, self.format.tool_parser if self.use.may_call else None]
        return any(parser is not None and parser.needs_special_tokens for parser in parsers)

    @property
    def form(self) -> StructuredOutputsParams | None:
        """The form that answers must have, for the engine: calls, where they must be, or strict ones where they may;
        None: any."""
        if self.use.choice == "auto":
            return self._form_of_free_calls()
        if not self.use.must_call:
            return None
        return form_of_calls(self.use, self.format.tool_parser.call_format if self.calls_its_own_way else None)

    def _form_of_free_calls(self) -> StructuredOutputsParams | None:
        level = self.format.strict_level
        if level == "auto" and not self.use.asks_for_strict:
            return None
        parser = self.format.tool_parser
        if not self.format.has_triggered_grammar:
            _note_not_strict(parser.__name__)
            return None
        all_strict = level == "parameter"
        if parser.tagged_format is not None:
            return form_of_free_tagged_calls(self.use, parser.tagged_format, all_strict=all_strict)
        return form_of_free_calls(self.use, parser.call_format, all_strict=all_strict)

    @property
    def calls_its_own_way(self) -> bool:
        """Whether calls come as the model writes them, rather than as JSON that a grammar asked for."""
        if not self.use.must_call:
            return True
        parser = self.format.tool_parser
        return parser is not None and parser.call_format is not None

    def parser(self, prompt: str, continued: str | None = None) -> AnswerParser:
        """For one answer behind this prompt. continued: the beginning of the answer, if the prompt has one."""
        reasoning, read_all_by = None, None
        if (cls := self.format.reasoning_parser) is not None:
            read_all_by = cls.read_by_tool_parser
            if read_all_by is None:
                reasoning = cls(begins_open=cls.open_after(prompt, continued))
        tools = self._tool_parser()
        if read_all_by is not None and (tools is None or type(tools) is self.format.tool_parser):
            tools = TOOL_PARSERS.get(read_all_by)(self.use.tools if self.use.may_call else None)
        return AnswerParser(reasoning, tools, self.use, self.include_reasoning)

    def _tool_parser(self) -> ToolParser | None:
        if not self.use.may_call:
            return None
        if self.calls_its_own_way:
            return self.format.tool_parser(self.use.tools)
        if self.use.choice == "named":
            return ArgumentsToolParser(self.use.tools, self.use.name)
        return JsonListToolParser(self.use.tools)


@functools.cache
def _note_not_strict(parser: str) -> None:
    """Say so in the log, once."""
    logger.warning(
        "function.strict is not enforced with tool_choice auto: %s reads calls that no grammar can begin by itself; "
        "it is with tool_choice required or a function's name",
        parser,
    )


class AnswerParser:
    """One answer's text, fed as it comes."""

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tools: ToolParser | None,
        use: ToolUse = NO_TOOLS,
        include_reasoning: bool = True,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._use = use
        self._include_reasoning = include_reasoning
        self.num_complete_calls = 0
        self.num_cut_calls = 0

    @property
    def reads_calls(self) -> bool:
        return self._tools is not None

    def feed(self, text: str) -> list[Piece]:
        """More of the text; what it adds to the answer."""
        if self._reasoning is None:
            return self._kept(self._answer(text))
        return self._kept(self._parted(self._reasoning.feed(text)))

    def finish(self) -> list[Piece]:
        """The text is over; what that adds to the answer."""
        pieces = [] if self._reasoning is None else self._parted(self._reasoning.finish())
        if self._tools is not None:
            pieces += self._tools.finish()
        return self._kept(pieces)

    def finish_reason(self, engines: str | None) -> str | None:
        """The API's reason for the end, of the engine's: a call that was asked for by name ends as text does."""
        if engines == "stop" and self.num_complete_calls and self._use.choice != "named":
            return "tool_calls"
        return engines

    def _parted(self, parts: list) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            pieces += [Reasoning(part.text)] if part.is_reasoning else self._answer(part.text)
        return pieces

    def _answer(self, text: str) -> list[Piece]:
        if self._tools is not None:
            return self._tools.feed(text)
        return [Content(text)] if text else []

    def _kept(self, pieces: list[Piece]) -> list[Piece]:
        """Without what the request does not want: reasoning, or calls beside the first. Every call has an id."""
        kept: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Reasoning):
                if not self._include_reasoning:
                    continue
            elif not isinstance(piece, Content):
                if piece.index and not self._use.parallel:
                    continue
                if isinstance(piece, CallStart) and piece.id is None:
                    piece = piece._replace(id=self._tools.make_id())
                elif isinstance(piece, CallEnd):
                    self.num_complete_calls += piece.complete
                    self.num_cut_calls += not piece.complete
            kept.append(piece)
        return kept
