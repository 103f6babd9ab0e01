"""One request of chat on its way: what was asked, and the pieces of its answers as the engine makes them.

Chat, responses and messages make their bodies and events of these; so does what counts tokens, for usage.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minivllm.entrypoints.answer_format import AnswerParser, AnswerPlan
from minivllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatLogprob,
    ChatLogprobs,
)
from minivllm.entrypoints.openai.logprobs import LogprobsFormatter
from minivllm.entrypoints.openai.protocol import CompletionTokensDetails, Usage
from minivllm.entrypoints.openai.render import ChatPrompt
from minivllm.entrypoints.openai.serving_base import Answering, check_output
from minivllm.outputs import CompletionOutput, PromptLogprobs, RequestOutput
from minivllm.reasoning.counter import ReasoningCounter
from minivllm.tool_parsers.pieces import Piece

if TYPE_CHECKING:
    from minivllm.metrics.serving import ToolCallMetrics
    from minivllm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class AnswerDelta:
    """What one output of the engine adds to the answer `index`; of a whole answer, all of it."""

    index: int
    pieces: list[Piece]
    token_ids: list[int]
    logprobs: ChatLogprobs | None
    is_reasoning: list[bool]  # of each token, marks included; empty: none is
    finish_reason: str | None  # chat's
    stop_reason: int | str | None

    @property
    def text_logprobs(self) -> list[ChatLogprob]:
        """Of those tokens that are no reasoning."""
        rows = [] if self.logprobs is None else self.logprobs.content
        if not self.is_reasoning:
            return rows
        return [row for row, is_reasoning in zip(rows, self.is_reasoning) if not is_reasoning]


@dataclass
class ChatJob:
    """outputs: the engine's. show_cached: whether usage tells how much of the prompt was cached."""

    request: ChatCompletionRequest
    answering: Answering
    prompt: ChatPrompt
    token_ids: list[int]  # of the prompt, as far as it is kept
    n: int
    role: str
    echo: str
    formatter: LogprobsFormatter
    plan: AnswerPlan
    tokenizer: Tokenizer
    outputs: AsyncGenerator[RequestOutput, None]
    shows_cached: bool = False
    api: str = "chat"  # through which it came
    tool_metrics: ToolCallMetrics | None = None
    prompt_logprobs: PromptLogprobs | None = None
    _num_tokens: dict[int, int] = field(default_factory=dict)  # generated so far, by answer
    _parsers: dict[int, AnswerParser] = field(default_factory=dict)  # by answer
    _counters: dict[int, ReasoningCounter] = field(default_factory=dict)  # by answer
    _num_cached: int | None = None  # prompt tokens from the prefix cache

    async def deltas(self) -> AsyncGenerator[AnswerDelta, None]:
        """All answers, as they grow.

        Raises:
            EngineError: the engine failed.
        """
        async with contextlib.aclosing(self.outputs) as outputs:
            async for output in outputs:
                check_output(output)
                if self._num_cached is None:  # of n answers the first: the others find what it has left
                    self._num_cached = output.num_cached_tokens or 0
                self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
                for answer in output.outputs:
                    yield self._delta(answer)

    def usage(self, index: int | None = None) -> Usage:
        """So far, of all answers or of one."""
        indices = self._num_tokens if index is None else (index,)
        usage = Usage.of(
            len(self.token_ids),
            sum(self._num_tokens[i] for i in indices),
            (self._num_cached or 0) if self.shows_cached else None,
        )
        if self.plan.format.reasoning_parser is not None:
            num_reasoning = sum(self._counters[i].num_tokens for i in indices)
            usage.completion_tokens_details = CompletionTokensDetails(num_reasoning)
        return usage

    def _delta(self, answer: CompletionOutput) -> AnswerDelta:
        index = answer.index
        if index not in self._parsers:
            self._open(index)
        self._num_tokens[index] += len(answer.token_ids)
        counter, parser = self._counters.get(index), self._parsers[index]
        pieces = parser.feed(answer.text)
        if answer.finish_reason is not None:
            pieces += parser.finish()
            if self.tool_metrics is not None and parser.reads_calls:
                self.tool_metrics.count(
                    self.api,
                    is_stream=self.request.stream,
                    num_complete=parser.num_complete_calls,
                    num_cut=parser.num_cut_calls,
                )
        return AnswerDelta(
            index=index,
            pieces=pieces,
            token_ids=answer.token_ids,
            logprobs=self._logprobs(answer),
            is_reasoning=[] if counter is None else counter.follow(answer.token_ids),
            finish_reason=parser.finish_reason(answer.finish_reason),
            stop_reason=answer.stop_reason,
        )

    def _open(self, index: int) -> None:
        self._num_tokens[index] = 0
        self._parsers[index] = self.plan.parser(self.prompt.text, self.prompt.continued)
        if (reasoning := self.plan.format.reasoning_parser) is not None:
            self._counters[index] = reasoning.counter(
                lambda text: self.tokenizer.encode(text, add_special_tokens=False),
                is_open=reasoning.open_after(self.prompt.text, self.prompt.continued),
            )

    def _logprobs(self, answer: CompletionOutput) -> ChatLogprobs | None:
        if self.request.num_logprobs is None or not answer.logprobs:
            return None
        num_top = -1 if self.request.logprob_token_ids is not None else self.request.num_logprobs
        return self.formatter.chat(answer.token_ids, answer.logprobs, num_top)
