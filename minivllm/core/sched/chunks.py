"""How many tokens of a request one step computes: how prompts are cut so that nobody starves behind one.

A decode is one token and never waits. Of prompts:

    reserve     every running request behind keeps a token of the budget
    share       while others want prompt tokens, long prompts together take at most half of what the decodes leave of
                the step; a prompt is long when more than half a step is left of it. What nobody else used comes
                to them in the end
    threshold   --long-prefill-token-threshold caps a chunk, unless the request is alone, whatever is left over
    mixed       while somebody decodes, all prompts together get --max-num-mixed-prefill-tokens of a step, for each
                token of theirs holds up those who decode; or a sixteenth of all prompt tokens that wait, if that is
                more, so that a backlog is worked off. benchmarks/mixed_steps.py shows what that does to streams and to
                first tokens

So short prompts behind a long one find half of every step, and the long one, begun, has the other half.
"""

from __future__ import annotations

from itertools import islice

from minivllm.core.request import Request
from minivllm.core.sched.request_queue import RequestQueue
from minivllm.core.sched.step import Step

_STEPS_FOR_BACKLOG = 16


class ChunkSizes:
    """Reads the queues, changes nothing. Without chunked prefill nothing is cut."""

    def __init__(
        self,
        running: list[Request],
        waiting: RequestQueue,
        *,
        token_budget: int,
        prompt_share: float,
        long_prefill_token_threshold: int,
        enable_chunked_prefill: bool,
        max_num_running: int,
        max_num_mixed_prefill_tokens: int = 0,
    ) -> None:
        """prompt_share: of a step, above 0; 1 lets one prompt have all of it, as vLLM does.
        max_num_mixed_prefill_tokens: 0 sets no such limit.
        """
        self._running = running
        self._waiting = waiting
        self._prompt_share = prompt_share if enable_chunked_prefill else 1.0
        self._token_budget = token_budget
        self._long = int(token_budget * self._prompt_share)
        self._threshold = long_prefill_token_threshold if enable_chunked_prefill else 0
        self._mixed = max_num_mixed_prefill_tokens if enable_chunked_prefill else 0
        self._max_num_running = max_num_running

    def token_budget(self) -> int:
        """Of the step that begins now. Looks at every request that runs or could start."""
        if not self._mixed:
            return self._token_budget
        wanted = [request.num_schedulable_tokens - request.num_computed_tokens for request in self._running]
        prompts = [num_tokens for num_tokens in wanted if num_tokens > 1]
        num_decoding = len(wanted) - len(prompts)
        if num_decoding == 0:
            return self._token_budget
        could_start = islice(self._waiting, self._max_num_running - len(self._running))
        backlog = sum(prompts) + sum(request.num_tokens for request in could_start)
        return min(self._token_budget, num_decoding + max(self._mixed, backlog // _STEPS_FOR_BACKLOG))

    def long_budget(self, token_budget: int) -> int:
        """What long prompts may take of a step of so many tokens while others wait."""
        return max(1, int((token_budget - len(self._running)) * self._prompt_share))

    def is_long(self, num_wanted: int) -> bool:
        return num_wanted > self._long

    def cap(self, num_wanted: int) -> int:
        """What of `num_wanted` the threshold lets through."""
        is_alone = len(self._running) + len(self._waiting) == 1
        return num_wanted if not self._threshold or is_alone else min(num_wanted, self._threshold)

    def of_running(self, index: int, num_wanted: int, step: Step) -> int:
        """For running[index], which wants several tokens; may be 0."""
        num_behind = len(self._running) - index - 1
        chunk = min(self.cap(num_wanted), step.token_budget - num_behind)
        if num_wanted > self._long and self._others_want_prompt_tokens(index):
            chunk = min(chunk, step.long_budget)
        return max(chunk, 0)  # a step beside decodes may be smaller than there are requests behind

    def of_candidate(self, num_wanted: int, step: Step) -> int:
        """For the first of the queue, not yet admitted; at least 1 while there is budget."""
        chunk = min(self.cap(num_wanted), step.token_budget)
        if num_wanted > self._long and len(self._waiting) > 1:
            chunk = min(chunk, max(1, int(step.token_budget * self._prompt_share)))
        return chunk

    def _others_want_prompt_tokens(self, index: int) -> bool:
        if self._waiting:
            return True
        return any(
            request.num_tokens - request.num_computed_tokens > 1 for request in self._running[index + 1 :]
        )
