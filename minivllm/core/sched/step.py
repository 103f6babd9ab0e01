"""One step, from when it is planned until its result is in: the budget that is left, and what was decided."""

from __future__ import annotations

from typing import NamedTuple

from minivllm.core.kv_cache_manager import BlockIds
from minivllm.core.request import Request
from minivllm.messages.worker import CachedRequestData, NewRequestData, SchedulerOutput


class Shortened(NamedTuple):
    """A prompt that leaves some of the budget to others, and would take more of what these do not use."""

    request: Request
    num_wanted: int  # beyond what it has in this step
    block_ids: BlockIds  # in the plan: new blocks are appended to it


class Step:
    """Collects decisions; makes none. `describe` turns them into the message.

    While the plan is in flight it stays with the scheduler, for the result is of the requests as they were: by then
    one may have ended and its id be in use again, or it was preempted, and what was computed of it is gone.
    """

    def __init__(
        self, number: int, token_budget: int, block_size: int, now: float = 0.0, *, long_budget: int = 0
    ) -> None:
        self.number = number
        self.token_budget = token_budget
        self.long_budget = long_budget  # what long prompts may still take of it while others wait
        self.shortened: list[Shortened] = []
        self.cut_prompts = False  # somebody that runs may have got fewer tokens than it wanted
        self.now = now
        self.preempted: list[str] = []
        self.blocks_underway: set[bytes] = set()  # prompt blocks that running requests complete, or will
        # The batch, as columns: first those the worker knows, and from `describe` on the new ones behind them.
        self.requests: list[Request] = []
        self.begins: list[int] = []  # tokens of each computed before
        self.counts: list[int] = []  # and in this step
        self.lost: set[Request] = set()  # of them, preempted since: they keep their tokens of this step, not the KV
        self._block_ids: dict[int, BlockIds] = {}  # by column: what the worker appends to the block tables …
        self._resumed: set[int] = set()  # … or, in these columns, puts in its place
        self._new_requests: list[Request] = []
        self._new: list[NewRequestData] = []
        self._new_counts: list[int] = []
        self._block_size = block_size

    def schedule_decode(self, request: Request, begin: int) -> None:
        """One token of a request that runs, at `begin`, in a block it has."""
        self.requests.append(request)
        self.begins.append(begin)
        self.counts.append(1)
        self.token_budget -= 1
        request.num_computed_tokens = end = begin + 1
        if end < request.placeholders_end:
            request.num_schedulable_tokens = end + 1

    def schedule_running(self, request: Request, num_new_tokens: int, new_block_ids: BlockIds) -> None:
        """The worker knows it: only what changed travels."""
        self._block_ids[len(self.requests)] = new_block_ids
        self.requests.append(request)
        self.begins.append(request.num_computed_tokens)
        self.counts.append(num_new_tokens)
        self._spend(request, num_new_tokens)

    def schedule_admitted(self, request: Request, num_new_tokens: int, block_ids: BlockIds) -> None:
        """New to the worker, or back after a preemption with a new block table."""
        if request.scheduled_time is None:
            request.scheduled_time = self.now
        if request.known_to_worker:
            self._resumed.add(len(self.requests))
            self.schedule_running(request, num_new_tokens, block_ids)
        else:
            request.known_to_worker = True
            self._new_requests.append(request)
            self._new.append(_new_request_data(request, block_ids))
            self._new_counts.append(num_new_tokens)
            self._spend(request, num_new_tokens)

    def includes(self, request: Request) -> bool:
        return request in self.requests or request in self._new_requests

    def add_tokens(self, request: Request, num_more: int) -> None:
        """More tokens for a request that has some in this step already."""
        if request in self.requests:
            self.counts[self.requests.index(request)] += num_more
        else:
            self._new_counts[self._new_requests.index(request)] += num_more
        self._spend(request, num_more)

    def will_complete_next_block(self, request: Request) -> None:
        """It runs but gets nothing in this step; what it computes next is underway all the same."""
        index = request.num_computed_tokens // self._block_size
        self.blocks_underway.update(request.block_hashes[index : index + 1])

    def describe(self, finished_req_ids: list[str]) -> SchedulerOutput:
        """The plan, as the worker will read it. Nothing may be added afterwards."""
        request_ids = [request.request_id for request in self.requests]
        known = CachedRequestData(
            request_ids=request_ids,
            new_block_ids=[[]] * len(request_ids),  # one list for all: it is only read
            resumed=[False] * len(request_ids),
            num_computed_tokens=list(self.begins),
        )
        for column, block_ids in self._block_ids.items():
            known.new_block_ids[column] = block_ids
        for column in self._resumed:
            known.resumed[column] = True
        self.requests += self._new_requests
        self.begins += [new.num_computed_tokens for new in self._new]
        self.counts += self._new_counts
        return SchedulerOutput(
            step=self.number,
            scheduled_new_reqs=self._new,
            scheduled_cached_reqs=known,
            num_scheduled_tokens=dict(zip(request_ids + [new.request_id for new in self._new], self.counts)),
            total_num_scheduled_tokens=sum(self.counts),
            finished_req_ids=finished_req_ids,
            preempted_req_ids=self.preempted,
        )

    def mark_preempted(self, request: Request) -> None:
        """While the plan is in flight: the KV that it computes of a request is gone."""
        if request in self.requests:
            self.lost.add(request)

    def num_tokens_of(self, request: Request) -> int:
        """How many tokens of a request the plan computes that it still has the KV of."""
        if request not in self.requests or request in self.lost:
            return 0
        return self.counts[self.requests.index(request)]

    def _spend(self, request: Request, num_new_tokens: int) -> None:
        self.token_budget -= num_new_tokens
        start = request.num_computed_tokens
        request.num_computed_tokens = end = start + num_new_tokens
        if end == request.num_schedulable_tokens and end < request.placeholders_end:
            request.num_schedulable_tokens = end + 1
        first, last = start // self._block_size, end // self._block_size
        if first < last:
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
        prompt_embeds=request.prompt_embeds,
    )
