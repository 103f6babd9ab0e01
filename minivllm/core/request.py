"""A request as the scheduler sees it: its tokens, and how far they have been computed.

Owns no blocks (see kv_cache_manager) and makes no decision but one: whether a token ends it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum

from minivllm.core.grammar import GrammarState
from minivllm.messages.engine import EngineCoreRequest, FinishReason
from minivllm.sampling_params import RepetitionDetectionParams


class RequestStatus(IntEnum):
    """Where a request is. PREEMPTED waits too, but the worker still knows its tokens."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED = 3


class Request:
    """Its state is its tokens; everything else can be recomputed from them.

    Plans run ahead of their results. `num_computed_tokens` counts what has been scheduled; `num_confirmed_tokens`
    follows when the step's result is in, and only KV of confirmed tokens is ever hashed. `num_schedulable_tokens` is
    how far plans may go: over all known tokens, and over placeholders for those that plans in flight sample, since
    the worker will know them by then; but never over the last token a request may have, which is nobody's input.
    """

    __slots__ = (
        "request_id", "client_index", "sampling_params", "seed", "cache_salt", "lora", "prompt_embeds", "priority",
        "arrival_time", "order",
        "prompt_token_ids", "prior_output_token_ids", "all_token_ids", "num_prompt_tokens", "block_hashes",
        "status", "num_computed_tokens", "num_confirmed_tokens", "num_schedulable_tokens", "max_num_tokens",
        "placeholders_end", "known_to_worker", "num_preemptions",
        "finish_reason", "stop_reason", "error", "error_param",
        "scheduled_time", "num_cached_tokens", "num_prompt_logprobs_sent", "answered",
        "_eos_token_ids", "_stop_token_ids", "_end_token_ids", "_min_output_tokens", "_repetition", "_block_hasher",
        "num_tokens_to_next_hash", "grammar",
        "eos_token_ids",
    )  # fmt: skip

    def __init__(
        self, message: EngineCoreRequest, block_hasher: Callable[[Request], None] | None, max_model_len: int
    ) -> None:
        params = message.sampling_params
        self.request_id = message.request_id
        self.client_index = message.client_index
        self.sampling_params = params
        self.seed = message.seed
        self.cache_salt = message.cache_salt
        self.lora = message.lora
        self.prompt_embeds = message.prompt_embeds
        self.priority = message.priority
        self.arrival_time = message.arrival_time
        self.order: tuple = ()  # its place among all requests; set by the scheduler's policy, see request_queue
        self.prompt_token_ids = message.prompt_token_ids
        self.prior_output_token_ids = message.prior_output_token_ids
        self.eos_token_ids = message.eos_token_ids
        self.all_token_ids = message.prompt_token_ids + message.prior_output_token_ids
        self.num_prompt_tokens = len(message.prompt_token_ids)

        self.status = RequestStatus.WAITING
        self.num_computed_tokens = 0
        self.num_confirmed_tokens = 0
        self.num_schedulable_tokens = len(self.all_token_ids)
        self.max_num_tokens = max_model_len  # prompt and output
        if params.max_tokens is not None:
            self.max_num_tokens = min(max_model_len, self.num_prompt_tokens + params.max_tokens)
        self.placeholders_end = self.max_num_tokens - 1  # no placeholder from this position on
        self.known_to_worker = False
        self.num_preemptions = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.error_param: str | None = None  # the field whose fault it was; None: not the request's own

        self.scheduled_time: float | None = None
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache when first admitted
        self.num_prompt_logprobs_sent = 0
        self.answered = False  # at least one output has left
        self.grammar: GrammarState | None = None

        self._eos_token_ids = frozenset() if params.ignore_eos else frozenset(message.eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids or ())
        self._end_token_ids = self._eos_token_ids | self._stop_token_ids
        self._min_output_tokens = params.min_tokens
        self._repetition = params.repetition_detection
        self.block_hashes: list[bytes] = []  # of the full blocks of all_token_ids
        self.num_tokens_to_next_hash = sys.maxsize  # at so many tokens a block is full; kept by the hasher
        self._block_hasher = block_hasher
        if block_hasher is not None:
            block_hasher(self)

    @classmethod
    def from_message(
        cls,
        message: EngineCoreRequest,
        block_hasher: Callable[[Request], None] | None = None,
        max_model_len: int = sys.maxsize,
    ) -> Request:
        """Make a waiting request. Without a `block_hasher` it never meets the prefix cache."""
        return cls(message, block_hasher, max_model_len)

    @property
    def num_tokens(self) -> int:
        """Prompt and output, prior output included."""
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, prior ones included: a resend goes on where the first send ended."""
        return len(self.all_token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True until every prompt position has been reported; until then the prompt must be computed, not found."""
        return (
            self.sampling_params.scores_prompt
            and self.num_prompt_logprobs_sent < self.num_prompt_tokens - 1
        )

    def append_output_tokens(self, token_ids: list[int]) -> int:
        """Append sampled tokens up to and with the one that ends the request; how many those are."""
        known = self.all_token_ids
        for num_appended, token_id in enumerate(token_ids, 1):
            known.append(token_id)
            num_tokens = len(known)
            if num_tokens > self.num_schedulable_tokens:
                self.num_schedulable_tokens = num_tokens
            if num_tokens >= self.num_tokens_to_next_hash:
                self._block_hasher(self)
            if token_id in self._end_token_ids or num_tokens >= self.max_num_tokens or self._repetition is not None:
                if self.finish_if_stopped():
                    return num_appended
            if self.grammar is not None and self.follow_grammar(token_id):
                return num_appended
        return len(token_ids)

    def forget_computed(self) -> None:
        """Its blocks are gone; its tokens stay, those that are still being sampled too."""
        self.num_computed_tokens = 0
        self.num_confirmed_tokens = 0

    def finish(
        self,
        reason: FinishReason,
        *,
        stop_reason: int | str | None = None,
        error: str | None = None,
        error_param: str | None = None,
    ) -> None:
        assert self.status is not RequestStatus.FINISHED, f"{self.request_id} ended twice"
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.error = error
        self.error_param = error_param

    def finish_if_stopped(self) -> bool:
        """End it if its last output token ends it: end of sequence, then stop tokens, length, repetition.

        `min_tokens` must come before the stopping token, as the sampler masks it until then.
        """
        num_output_tokens = len(self.all_token_ids) - self.num_prompt_tokens
        if num_output_tokens == 0:
            return False
        if num_output_tokens > self._min_output_tokens:
            last = self.all_token_ids[-1]
            if last in self._eos_token_ids:
                self.finish(FinishReason.STOP)
                return True
            if last in self._stop_token_ids:
                self.finish(FinishReason.STOP, stop_reason=last)
                return True
        if len(self.all_token_ids) >= self.max_num_tokens:
            self.finish(FinishReason.LENGTH)
            return True
        if self._repetition is not None and num_output_tokens >= self._min_output_tokens:
            if ends_in_repetition(self.all_token_ids, num_output_tokens, self._repetition):
                self.finish(FinishReason.REPETITION, stop_reason="repetition_detected")
                return True
        return False

    def follow_grammar(self, token_id: int) -> bool:
        """Go on in its grammar by a token that did not end it; whether the grammar ends it."""
        self.grammar.accept(token_id)
        return self.finish_if_grammar_ends()

    def finish_if_grammar_ends(self) -> bool:
        """End it if its grammar is complete, or failed. To be called once that is ready."""
        if self.grammar.error is not None:
            self.finish(FinishReason.ERROR, error=self.grammar.error, error_param=self.grammar.error_param)
        elif self.grammar.is_complete:
            self.finish(FinishReason.STOP)
        return self.finished


def ends_in_repetition(token_ids: list[int], num_last: int, params: RepetitionDetectionParams) -> bool:
    """Whether the last `num_last` tokens end in min_count equal patterns of a size that counts."""
    for size in range(max(params.min_pattern_size, 1), params.max_pattern_size + 1):
        if size * params.min_count > num_last:
            return False
        if token_ids[-1] != token_ids[-1 - size]:  # most patterns end here
            continue
        pattern = token_ids[-size:]
        # From the end backwards: the first difference ends it.
        if all(token_ids[-size * (k + 1) : -size * k] == pattern for k in range(1, params.min_count)):
            return True
    return False
