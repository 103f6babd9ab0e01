"""One step while it is being planned: the budget that is left, and what was decided so far."""

from __future__ import annotations

from minivllm.core.request import Request
from minivllm.messages.worker import CachedRequestData, NewRequestData, SchedulerOutput


class Step:
    """Collects decisions; makes none. `describe` turns them into the message."""

    def __init__(self, token_budget: int, block_size: int, now: float = 0.0) -> None:
        self.token_budget = token_budget
        self.now = now
        self.preempted: list[str] = []
        self.blocks_underway: set[bytes] = set()  # hashes of prompt blocks that this step completes
        self._block_size = block_size
        self._num_scheduled_tokens: dict[str, int] = {}
        self._new: list[NewRequestData] = []
        self._cached = CachedRequestData()

    def schedule_running(self, request: Request, num_new_tokens: int, new_block_ids: list[int]) -> None:
        """The worker knows it: only what changed travels."""
        self._append_cached(request, new_block_ids, resumed=False)
        self._spend(request, num_new_tokens)

    def schedule_admitted(self, request: Request, num_new_tokens: int, block_ids: list[int]) -> None:
        """New to the worker, or back after a preemption with a new block table."""
        if request.known_to_worker:
            self._append_cached(request, block_ids, resumed=True)
        else:
            self._new.append(_new_request_data(request, block_ids))
            request.known_to_worker = True
        if request.scheduled_time is None:
            request.scheduled_time = self.now
        self._spend(request, num_new_tokens)

    def describe(self, number: int, finished_req_ids: list[str]) -> SchedulerOutput:
        """The plan, as the worker will read it."""
        return SchedulerOutput(
            step=number,
            scheduled_new_reqs=self._new,
            scheduled_cached_reqs=self._cached,
            num_scheduled_tokens=self._num_scheduled_tokens,
            total_num_scheduled_tokens=sum(self._num_scheduled_tokens.values()),
            finished_req_ids=finished_req_ids,
            preempted_req_ids=self.preempted,
        )

    def _append_cached(self, request: Request, block_ids: list[int], *, resumed: bool) -> None:
        columns = self._cached
        columns.request_ids.append(request.request_id)
        columns.new_block_ids.append(block_ids)
        columns.resumed.append(resumed)
        columns.num_computed_tokens.append(request.num_computed_tokens)

    def _spend(self, request: Request, num_new_tokens: int) -> None:
        self._num_scheduled_tokens[request.request_id] = num_new_tokens
        self.token_budget -= num_new_tokens
        start = request.num_computed_tokens
        request.num_computed_tokens = end = start + num_new_tokens
        if num_new_tokens > 1:  # a decode completes a block too seldom to look
            first, last = start // self._block_size, end // self._block_size
            self.blocks_underway.update(request.block_hashes[first:last])


def _new_request_data(request: Request, block_ids: list[int]) -> NewRequestData:
    return NewRequestData(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        prior_output_token_ids=request.prior_output_token_ids,
        sampling_params=request.sampling_params,
        seed=request.seed,
        eos_token_ids=request.eos_token_ids,
        block_ids=block_ids,
        num_computed_tokens=request.num_computed_tokens,
    )
