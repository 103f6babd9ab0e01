"""One step while it is being planned: the budget that is left, and what was decided so far."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import astuple

from minivllm.core.kv_cache_manager import BlockIds
from minivllm.core.request import Request
from minivllm.messages.worker import CachedRequestData, NewRequestData, SchedulerOutput


class Shortened(NamedTuple):
    """A prompt that leaves some of the budget to others, and would take more of what these do not use."""

    request: Request
    num_wanted: int  # beyond what it has in this step
    block_ids: BlockIds  # in the plan: new blocks are appended to it


class Step:
    """Collects decisions; makes none. `describe` turns them into the message."""

    def __init__(self, token_budget: int, block_size: int, now: float = 0.0, *, long_budget: int = 0) -> None:
        self.token_budget = token_budget
        self.long_budget = long_budget  # what long prompts may still take of it while others wait
        self.shortened: list[Shortened] = []
        self.now = now
        self.preempted: list[str] = []
        self.blocks_underway: set[bytes] = set()  # prompt blocks that running requests complete, or will
        self._block_size = block_size
        self._num_scheduled_tokens: dict[str, int] = {}
        self._new: list[NewRequestData] = []
        self._cached = CachedRequestData()
        self._columns = astuple(self._cached)

    def schedule_running(self, request: Request, num_new_tokens: int, new_block_ids: BlockIds) -> None:
        """The worker knows it: only what changed travels."""
        self._append_cached(request, new_block_ids, False)
        self._spend(request, num_new_tokens)

    def schedule_admitted(self, request: Request, num_new_tokens: int, block_ids: BlockIds) -> None:
        """New to the worker, or back after a preemption with a new block table."""
        if request.known_to_worker:
            self._append_cached(request, block_ids, True)
        else:
            self._new.append(_new_request_data(request, block_ids))
            request.known_to_worker = True
        if request.scheduled_time is None:
            request.scheduled_time = self.now
        self._spend(request, num_new_tokens)

    def add_tokens(self, request: Request, num_more: int) -> None:
        """More tokens for a request that has some in this step already."""
        num_before = self._num_scheduled_tokens[request.request_id]
        self._spend(request, num_more)
        self._num_scheduled_tokens[request.request_id] = num_before + num_more

    def includes(self, request: Request) -> bool:
        return request.request_id in self._num_scheduled_tokens

    def will_complete_next_block(self, request: Request) -> None:
        """It runs but gets nothing in this step; what it computes next is underway all the same."""
        index = request.num_computed_tokens // self._block_size
        self.blocks_underway.update(request.block_hashes[index : index + 1])

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

    def _append_cached(self, request: Request, block_ids: BlockIds, resumed: bool) -> None:
        request_ids, new_block_ids, resumes, num_computed_tokens = self._columns
        request_ids.append(request.request_id)
        new_block_ids.append(block_ids)
        resumes.append(resumed)
        num_computed_tokens.append(request.num_computed_tokens)

    def _spend(self, request: Request, num_new_tokens: int) -> None:
        self._num_scheduled_tokens[request.request_id] = num_new_tokens
        self.token_budget -= num_new_tokens
        start = request.num_computed_tokens
        request.num_computed_tokens = end = start + num_new_tokens
        if num_new_tokens > 1:  # a decode completes a block too seldom to look
            first, last = start // self._block_size, end // self._block_size
            self.blocks_underway.update(request.block_hashes[first:last])


def append_block_ids(block_ids: BlockIds, more: BlockIds) -> None:
    """Add to each group's list, in place; either may be the [] that says nothing."""
    if not block_ids:
        block_ids += more
        return
    for ids, new_ids in zip(block_ids, more):
        ids += new_ids


def _new_request_data(request: Request, block_ids: BlockIds) -> NewRequestData:
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
