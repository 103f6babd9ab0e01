"""What each step computes, and what each result means. The whole control side of the engine core.

Owns the requests, from acceptance to their one terminal output, and through the KVCacheManager their blocks.
Imports no torch, does no I/O, reads no clock; it never learns how a step is run.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

from minivllm.core.grammar import Grammars
from minivllm.core.kv_cache_manager import BlockIds, KVCacheManager
from minivllm.core.kv_cache_utils import make_block_hasher
from minivllm.core.request import Request, RequestStatus
from minivllm.core.sched.admission import (
    Candidate,
    FitsBatch,
    FitsTokenBudget,
    KVBlocksFree,
    PrefixNotUnderway,
)
from minivllm.core.sched.chunks import ChunkSizes
from minivllm.core.sched.request_queue import POLICIES, RequestQueue, insert_in_order
from minivllm.core.sched.step import Shortened, Step, append_block_ids
from minivllm.exceptions import ConfigError, RequestError
from minivllm.logger import init_logger
from minivllm.messages.engine import EngineCoreOutput, EngineCoreRequest, FinishReason, LogprobsLists
from minivllm.messages.kv_cache import ONE_FULL_GROUP, KVCacheGroup, longest_request
from minivllm.messages.kv_events import KVCacheEvent
from minivllm.messages.stats import EngineSnapshot, SchedulerStats
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput

logger = init_logger(__name__)

OutputsByClient = defaultdict[int, list[EngineCoreOutput]]

_MAX_PICTURED_BLOCKS = 16_384  # of a snapshot: so many take it 1 to 3 ms
_MAX_PASSED_OVER = 16  # requests a step may pass over on its way to one that can be admitted


class Scheduler:
    """Continuous batching over one token budget, in the policy's order, preemption by recompute.

    Without chunked prefill a prompt must fit into one step, so `max_num_batched_tokens` must reach
    `max_model_len`. One request of full length must fit the cache alone: that is what guarantees progress, since
    the first in order is never preempted for another.

    `prompt_share` is how much of a step one long prompt may take while others wait, `max_num_mixed_prefill_tokens` how
    much all prompts may while others decode, 0 for no such limit (see chunks.py). Without
    `grammars` no request may have one.

    Raises (on construction):
        ConfigError: the limits contradict each other; the message names both.
    """

    def __init__(
        self,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        num_blocks: int,
        block_size: int,
        kv_cache_groups: Sequence[KVCacheGroup] = ONE_FULL_GROUP,
        max_plans_in_flight: int = 1,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        policy: str = "fcfs",
        max_num_active_seqs: int | None = None,
        long_prefill_token_threshold: int = 0,
        watermark: float = 0.0,
        reserve_full_isl: bool = True,
        prompt_share: float = 0.5,
        max_num_mixed_prefill_tokens: int = 0,
        prefix_caching_hash_algo: str = "sha256",
        hash_secret: bytes = b"",
        record_kv_events: bool = False,
        grammars: Grammars | None = None,
    ) -> None:
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self._check_limits()
        # A window moves on when a result is in: behind it may lie what all plans in flight compute of one request.
        step_tokens = max_num_batched_tokens * max_plans_in_flight
        self._check_one_request_fits(kv_cache_groups, num_blocks, block_size, step_tokens)

        self.kv_cache = KVCacheManager(
            num_blocks,
            block_size,
            groups=kv_cache_groups,
            step_tokens=step_tokens,
            record_events=record_kv_events,
        )
        self.requests: dict[str, Request] = {}  # accepted and not yet answered for the last time
        self.waiting = RequestQueue()
        self.running: list[Request] = []  # in order; the list object stays the same, admission reads it
        self._in_flight: deque[Step] = deque()  # planned, and their results are not in
        self._policy = POLICIES[policy]
        self._num_accepted = 0
        self._block_hasher = None
        if enable_prefix_caching:
            self._block_hasher = make_block_hasher(block_size, prefix_caching_hash_algo, hash_secret)
        max_num_running = min(max_num_seqs, max_num_active_seqs or max_num_seqs)
        self._chunks = ChunkSizes(
            self.running,
            self.waiting,
            token_budget=max_num_batched_tokens,
            prompt_share=prompt_share,
            long_prefill_token_threshold=long_prefill_token_threshold,
            enable_chunked_prefill=enable_chunked_prefill,
            max_num_running=max_num_running,
            max_num_mixed_prefill_tokens=max_num_mixed_prefill_tokens,
        )
        self._blocks_free = KVBlocksFree(
            self.kv_cache,
            self._chunks,
            self.running,
            reserve_full_isl=reserve_full_isl,
            num_kept=int(watermark * num_blocks),
        )
        self._admission_rules = [
            FitsBatch(self.running, max_num_running),
            FitsTokenBudget(enable_chunked_prefill),
            PrefixNotUnderway(self._in_flight),
            self._blocks_free,
        ]
        self._grammars = grammars
        self._with_grammar: dict[str, Request] = {}  # of `requests`
        self._compiling: list[Request] = []  # their grammars are not ready; they wait outside the queue
        self._holds_new = False
        self._held: list[Request] = []  # they wait outside the queue for `admit_new`, which is why none ran yet
        self._ended_on_arrival: list[Request] = []
        self._finished_req_ids: list[str] = []  # the worker must forget these
        self._preempted_between: list[Request] = []  # since the last plan; the next one tells the worker
        self._some_ended = False  # and may still stand in `running`
        self._cut_prompts = False  # in the last step: prompts that run may want more
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_scheduled_tokens = 0
        self._num_generation_tokens = 0  # since the start

    def _check_limits(self) -> None:
        budget, length = self.max_num_batched_tokens, self.max_model_len
        if not self.enable_chunked_prefill and budget < length:
            raise ConfigError(
                f"--max-num-batched-tokens {budget} is below --max-model-len {length}: without chunked prefill a "
                "prompt must fit into one step; raise it or drop --no-enable-chunked-prefill"
            )
        if not 1 <= self.max_num_seqs <= budget:
            raise ConfigError(
                f"--max-num-seqs {self.max_num_seqs} must be from 1 to --max-num-batched-tokens {budget}: "
                "every running request needs a token a step"
            )

    def _check_one_request_fits(
        self, groups: Sequence[KVCacheGroup], num_blocks: int, block_size: int, step_tokens: int
    ) -> None:
        fitting = longest_request(groups, num_blocks, step_tokens, block_size, limit=self.max_model_len)
        if fitting < self.max_model_len:
            raise ConfigError(
                f"{num_blocks} KV blocks of {block_size} tokens have room for one request of {fitting} tokens and "
                f"--max-model-len is {self.max_model_len}; lower --max-model-len to {fitting} or give the cache more "
                "memory"
            )

    # What comes in

    def add_request(self, request: EngineCoreRequest) -> None:
        """Accept a request; from now on it will be answered for the last time exactly once.

        Raises:
            RequestError: the id is in use, the prompt is empty or too long, or a token id fits no 32 bits.
        """
        self._check_request(request)
        try:
            accepted = Request.from_message(request, self._block_hasher, self.max_model_len)
        except OverflowError as error:
            raise RequestError(f"a token id is outside 0 … 2**32 - 1: {error}", param="prompt") from error
        accepted.order = self._policy(accepted, self._num_accepted)
        self._num_accepted += 1
        self.requests[accepted.request_id] = accepted
        if accepted.finish_if_stopped():
            self._ended_on_arrival.append(accepted)  # its prior output was all there is
        elif request.grammar is not None:
            accepted.grammar = self._grammars.start(request)
            self._with_grammar[accepted.request_id] = accepted
            self._compiling.append(accepted)
        else:
            self._enqueue(accepted)

    def _enqueue(self, request: Request) -> None:
        """To wait for its first step."""
        if self._holds_new:
            self._held.append(request)
        else:
            self.waiting.add(request)

    def hold_new(self) -> None:
        """Begin with no request from now on, be it queued or come later; those that have begun go on to their end."""
        self._holds_new = True
        for request in list(self.waiting):
            if request.status is RequestStatus.WAITING:
                self.waiting.remove(request)
                self._held.append(request)

    def admit_new(self) -> None:
        """Take up those held, each at its place in the order."""
        self._holds_new = False
        for request in self._held:
            self.waiting.add(request)
        self._held = []

    def _check_request(self, request: EngineCoreRequest) -> None:
        num_prompt_tokens = len(request.prompt_token_ids)
        if request.grammar is not None and self._grammars is None:
            raise RequestError("this engine has no grammars", param="structured_outputs")
        if request.request_id in self.requests:
            raise RequestError(
                f"request id {request.request_id!r} is in use; choose another", param="request_id"
            )
        if num_prompt_tokens == 0:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        embeds = request.prompt_embeds
        if embeds is not None and embeds.num_tokens != num_prompt_tokens:
            raise RequestError(
                f"{embeds.num_tokens} embeddings do not stand for {num_prompt_tokens} tokens", param="prompt_embeds"
            )
        if num_prompt_tokens >= self.max_model_len:
            raise RequestError(
                f"the prompt is {num_prompt_tokens} tokens and leaves no room for output within "
                f"{self.max_model_len}; shorten it or raise --max-model-len",
                param="prompt",
            )

    def abort_requests(self, request_ids: Iterable[str]) -> OutputsByClient:
        """End requests, waiting or running, even in mid-step: what plans in flight bring for them will be ignored.

        Returns their terminal outputs by client index. Unknown and already ended ids are ignored.
        """
        outputs: OutputsByClient = defaultdict(list)
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is None or request.finished:
                continue
            self._release(request, request.status)
            request.finish(FinishReason.ABORT)
            self._emit(outputs, request)
        self._drop_finished_from_running()
        return outputs

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Refused (False) while requests hold blocks."""
        return self.kv_cache.pool.reset_prefix_cache()

    def take_kv_events(self) -> list[KVCacheEvent]:
        """What the prefix cache stored and forgot since the last call; [] unless `record_kv_events`."""
        return self.kv_cache.take_events()

    # Questions

    def has_unfinished_requests(self) -> bool:
        """Some accepted request has not been answered for the last time."""
        return bool(self.requests)

    def has_begun_requests(self) -> bool:
        """Some request has had a step, and goes on."""
        return any(each.status is not RequestStatus.WAITING and not each.finished for each in self.requests.values())

    def has_requests(self) -> bool:
        """A step has something to do: requests that are not held, or finished ones the worker must still hear of."""
        return len(self.requests) > len(self._held) or bool(self._finished_req_ids)

    @property
    def _num_waiting(self) -> int:
        return len(self.waiting) + len(self._compiling) + len(self._held)

    def make_stats(self) -> SchedulerStats:
        """The state now; counters since the last call."""
        stats = SchedulerStats(
            num_running_reqs=len(self.running),
            num_waiting_reqs=self._num_waiting,
            kv_cache_usage=self.kv_cache.pool.usage,
            prefix_cache=self.kv_cache.take_prefix_stats(),
            num_preemptions=self._num_preemptions,
            num_scheduled_tokens=self._num_scheduled_tokens,
        )
        self._num_preemptions = self._num_scheduled_tokens = 0
        return stats

    def snapshot(self) -> EngineSnapshot:
        """The state now, with a picture of the block pool; counters since the start."""
        pool, prefix = self.kv_cache.pool, self.kv_cache.prefix_totals
        block_stride, blocks = pool.states(_MAX_PICTURED_BLOCKS)
        return EngineSnapshot(
            num_running_reqs=len(self.running),
            num_waiting_reqs=self._num_waiting,
            kv_cache_usage=pool.usage,
            num_prompt_tokens=prefix.queries,
            num_cached_tokens=prefix.hits,
            num_generation_tokens=self._num_generation_tokens,
            num_blocks=pool.num_blocks,
            block_stride=block_stride,
            blocks=blocks,
        )

    # A step out

    def schedule(self, now: float = 0.0) -> SchedulerOutput:
        """Give each request tokens until it has caught up or the budget is spent.

        There is no prefill phase and no decode phase: a request wants what is known of its tokens and not yet
        computed, whatever the reason it lags, and the place of the token that a plan in flight samples. Any number of
        plans may be in flight, to be executed in their order.
        `now` (seconds, any monotonic clock) becomes the scheduled_time of requests that enter.
        """
        any_prompt = self.waiting or self._cut_prompts
        token_budget = self._chunks.token_budget() if any_prompt else self.max_num_batched_tokens
        step = Step(
            self._num_steps,
            token_budget,
            self.kv_cache.block_size,
            now,
            long_budget=self._chunks.long_budget(token_budget),
        )
        if self._compiling:
            self._take_in_compiled()
        self._continue_running(step)
        if not step.preempted:  # a step that had to evict admits nobody
            self._admit_waiting(step)
        if step.shortened and step.token_budget:
            self._give_back_the_rest(step)
        self._cut_prompts = step.cut_prompts
        return self._describe(step)

    def _take_in_compiled(self) -> None:
        """Those whose grammar is ready take their place in the queue; the others hold up nobody."""
        still_compiling = []
        for request in self._compiling:
            if not request.grammar.is_ready:
                still_compiling.append(request)
            elif request.finish_if_grammar_ends():  # it did not compile, or the prior output was all of it
                self._ended_on_arrival.append(request)
            else:
                self._enqueue(request)
        self._compiling = still_compiling

    def _continue_running(self, step: Step) -> None:
        # The hot loop over running requests. Most decode within a block, which is there since the token before.
        block_size, schedule_decode = self.kv_cache.block_size, step.schedule_decode
        for index, request in enumerate(self.running):  # preemption shortens the list from the end as we go
            begin = request.num_computed_tokens
            num_wanted = request.num_schedulable_tokens - begin
            if step.token_budget == 0:
                step.cut_prompts = True
                return
            if num_wanted == 1 and begin % block_size:
                schedule_decode(request, begin)
            elif num_wanted and not self._continue(request, index, num_wanted, step):
                return

    def _continue(self, request: Request, index: int, num_wanted: int, step: Step) -> bool:
        """Give running[index] of the tokens it wants; False when it had to be preempted itself."""
        num_new_tokens = num_wanted
        if num_wanted > 1:
            num_new_tokens = self._chunks.of_running(index, num_wanted, step)
        new_block_ids: BlockIds | None = []
        if num_new_tokens > 0:
            new_block_ids = self.kv_cache.extend(request, request.num_computed_tokens + num_new_tokens)
            if new_block_ids is None:
                new_block_ids = self._preempt_until_it_fits(request, num_new_tokens, step)
            if new_block_ids is None:
                return False
            step.schedule_running(request, num_new_tokens, new_block_ids)
        else:
            step.will_complete_next_block(request)
        if num_new_tokens < num_wanted:
            self._note_shortened(request, num_wanted, num_new_tokens, new_block_ids, step)
        return True

    def _note_shortened(
        self, request: Request, num_wanted: int, num_given: int, block_ids: BlockIds, step: Step
    ) -> None:
        """It took less than it wanted, perhaps for the sake of others."""
        step.cut_prompts = True
        if self._chunks.is_long(num_wanted):
            step.long_budget -= num_given
        num_more = self._chunks.cap(num_wanted) - num_given
        if num_more > 0:
            step.shortened.append(Shortened(request, num_more, block_ids))

    def _give_back_the_rest(self, step: Step) -> None:
        """What is left of the budget goes, in order, to the prompts that left some of it to others."""
        for request, num_wanted, block_ids in step.shortened:
            num_more = min(num_wanted, step.token_budget)
            if num_more == 0:
                return
            new_block_ids = self.kv_cache.extend(request, request.num_computed_tokens + num_more)
            if new_block_ids is None:  # no reason to preempt anybody
                continue
            append_block_ids(block_ids, new_block_ids)
            if step.includes(request):
                step.add_tokens(request, num_more)
            else:
                step.schedule_running(request, num_more, block_ids)

    def _preempt_until_it_fits(self, request: Request, num_new_tokens: int, step: Step) -> BlockIds | None:
        """Blocks for the next tokens, at the cost of the last in order; None when that was the request itself."""
        new_block_ids = None
        while new_block_ids is None:
            victim = self.running.pop()
            self._preempt(victim, step)
            if victim is request:
                return None
            new_block_ids = self.kv_cache.extend(request, request.num_computed_tokens + num_new_tokens)
        return new_block_ids

    def _preempt(self, victim: Request, step: Step) -> None:
        assert self.running, f"{victim.request_id} was alone and did not fit the KV cache"
        self._requeue(victim)
        step.preempted.append(victim.request_id)

    def preempt_all(self) -> None:
        """Take the blocks of every running request: each waits, and goes on by computing again what it had.

        To be called when no plan is in flight.
        """
        assert not self._in_flight
        while self.running:
            victim = self.running.pop()
            self._requeue(victim)
            self._preempted_between.append(victim)

    def _requeue(self, victim: Request) -> None:
        logger.debug("preempted %s: %d tokens to recompute", victim.request_id, victim.num_computed_tokens)
        self.kv_cache.free(victim)
        for planned in self._in_flight:
            planned.mark_preempted(victim)
        victim.forget_computed()
        victim.status = RequestStatus.PREEMPTED
        victim.num_preemptions += 1
        self.waiting.add(victim)
        self._num_preemptions += 1

    def _admit_waiting(self, step: Step) -> None:
        passed_over: list[Request] = []
        while self.waiting and len(passed_over) < _MAX_PASSED_OVER:
            candidate = Candidate(self.waiting.peek(), self.kv_cache)
            hindrance = next((rule for rule in self._admission_rules if rule.why_not(candidate, step)), None)
            if hindrance is None:
                self._admit(candidate, step)
            elif hindrance.lets_others_pass:
                self.waiting.remove(candidate.request)
                passed_over.append(candidate.request)
            else:
                break  # nobody overtakes
        for request in passed_over:
            self.waiting.add(request)

    def _admit(self, candidate: Candidate, step: Step) -> None:
        request = candidate.request
        num_new_tokens = self._chunks.of_candidate(candidate.num_uncomputed_tokens, step)
        num_tokens_to_hold = self._blocks_free.num_tokens_to_hold(candidate, step)
        self.waiting.remove(request)
        request.num_computed_tokens = request.num_confirmed_tokens = candidate.num_cached_tokens
        if request.scheduled_time is None:
            request.num_cached_tokens = min(candidate.num_cached_tokens, request.num_prompt_tokens)
        block_ids = self.kv_cache.admit(request, candidate.cached_prefix, num_tokens_to_hold)
        request.status = RequestStatus.RUNNING
        insert_in_order(self.running, request)
        step.schedule_admitted(request, num_new_tokens, block_ids)
        if num_new_tokens < candidate.num_uncomputed_tokens:
            self._note_shortened(request, candidate.num_uncomputed_tokens, num_new_tokens, block_ids, step)

    def _describe(self, step: Step) -> SchedulerOutput:
        finished_req_ids, self._finished_req_ids = self._finished_req_ids, []
        between, self._preempted_between = self._preempted_between, []
        step.preempted += [r.request_id for r in between if self.requests.get(r.request_id) is r]
        plan = step.describe(finished_req_ids)
        self._in_flight.append(step)
        self._num_steps += 1
        self._num_scheduled_tokens += plan.total_num_scheduled_tokens
        return plan

    def lacks_tokens(self, plan: SchedulerOutput) -> bool:
        """Whether a mask for this plan depends on tokens that a plan before it has still to bring."""
        return any(
            request.num_computed_tokens > request.num_tokens and request_id in plan.num_scheduled_tokens
            for request_id, request in self._with_grammar.items()
        )

    def grammar_bitmask(self, plan: SchedulerOutput) -> GrammarOutput | None:
        """What the requests of a plan that have a grammar may sample, to be made while it runs; None if none has."""
        if not self._with_grammar:
            return None
        chosen = {
            request_id: request.grammar
            for request_id, request in self._with_grammar.items()
            if request_id in plan.num_scheduled_tokens
            and request.num_computed_tokens == request.num_tokens
            and request.grammar.is_constraining
        }
        if not chosen:
            return None
        return GrammarOutput(list(chosen), self._grammars.bitmask(list(chosen.values())))

    # Its result in

    def update_from_output(self, plan: SchedulerOutput, result: ModelRunnerOutput) -> OutputsByClient:
        """Account for the result of the oldest plan in flight. Returns what the clients must hear, by client index.

        A request that has ended since, by an abort or by the plan before, has nothing from this one. The blocks it
        held may be others' by now: what a plan in flight still writes to them comes before the first plan that gives
        them to somebody else, for plans are executed in their order, and nobody reads a place that he did not write.
        """
        step = self._in_flight.popleft()
        assert plan.step == step.number, f"the result of step {plan.step} came, that of {step.number} is due"
        assert result.request_ids == list(plan.num_scheduled_tokens), "the result is not in the plan's order"
        outputs: OutputsByClient = defaultdict(list)
        if result.failed:
            self._fail(step, result, outputs)
        block_size, lost, num_generated = self.kv_cache.block_size, step.lost, 0
        is_plain = not (result.logprobs or result.prompt_logprobs)
        # The only loop over results on this path; add per-request work here, or better in `_report`, which a request
        # that goes on as before does without.
        columns = (step.requests, step.begins, step.counts, result.sampled_token_ids)
        for request, begin, count, token_ids in zip(*columns, strict=True):
            status = request.status
            if status is RequestStatus.FINISHED:
                continue
            if request not in lost:
                request.num_confirmed_tokens = end = begin + count
                if end % block_size < count:
                    self.kv_cache.cache_confirmed_blocks(request)
            num_kept = request.append_output_tokens(token_ids)
            num_generated += num_kept
            if request.status is not status:
                self._release(request, status)
            elif is_plain and request.answered:
                if token_ids:
                    outputs[request.client_index].append(EngineCoreOutput(request.request_id, token_ids))
                continue
            self._report(request, begin, token_ids[:num_kept], result, outputs)
        self._num_generation_tokens += num_generated
        self._drop_finished_from_running()
        for request in self._ended_on_arrival:
            self._emit(outputs, request)
        self._ended_on_arrival.clear()
        return outputs

    def _fail(self, step: Step, result: ModelRunnerOutput, outputs: OutputsByClient) -> None:
        """End requests that the worker cannot go on with; the others do."""
        for request in step.requests:
            error = result.failed.get(request.request_id)
            if error is not None and not request.finished:
                # What this step wrote is in doubt: it is not offered to the cache.
                self._release(request, request.status)
                error_param = result.fields_at_fault.get(request.request_id)
                request.finish(FinishReason.ERROR, error=error, error_param=error_param)
                self._emit(outputs, request)

    def _release(self, request: Request, status: RequestStatus) -> None:
        """Let go of what a request has that ends, or ended, in this status: its blocks or its place in the queue."""
        if status is RequestStatus.RUNNING:
            self.kv_cache.free(request)
        elif request in self._compiling:
            self._compiling.remove(request)
        elif request in self._held:
            self._held.remove(request)
        else:
            self.waiting.remove(request)

    def _report(
        self, request: Request, begin: int, token_ids: list[int], result: ModelRunnerOutput, outputs: OutputsByClient
    ) -> None:
        """Tell the client what a result brought, if anything. begin: how many tokens were computed before it."""
        prompt_logprobs = self._unsent_rows(request, begin, result.prompt_logprobs.get(request.request_id))
        if token_ids or prompt_logprobs is not None:
            logprobs = result.logprobs.get(request.request_id)
            if logprobs is not None and len(token_ids) < len(logprobs.ranks):
                logprobs = _rows(logprobs, 0, len(token_ids))
            self._emit(outputs, request, token_ids, logprobs, prompt_logprobs)

    def _unsent_rows(self, request: Request, begin: int, rows: LogprobsLists | None) -> LogprobsLists | None:
        """The rows for positions not yet reported: a recompute brings some again, each goes out once.

        Row i is of prompt position begin + 1 + i.
        """
        if rows is None or not rows.token_ids:
            return None
        num_known = request.num_prompt_logprobs_sent - begin
        assert num_known >= 0, f"{request.request_id}: prompt logprobs skipped a position"
        if num_known >= len(rows.token_ids):
            return None
        request.num_prompt_logprobs_sent += len(rows.token_ids) - num_known
        return _rows(rows, num_known, None) if num_known else rows

    def _emit(
        self,
        outputs: OutputsByClient,
        request: Request,
        new_token_ids: list[int] | None = None,
        logprobs: LogprobsLists | None = None,
        prompt_logprobs: LogprobsLists | None = None,
    ) -> None:
        """Queue an output for the request's client; with a finish reason it is the last, and the request is gone."""
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=new_token_ids or [],
            new_logprobs=logprobs,
            new_prompt_logprobs=prompt_logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            error=request.error,
            error_param=request.error_param,
            num_preemptions=request.num_preemptions,
        )
        if not request.answered:
            request.answered = True
            output.num_cached_tokens = request.num_cached_tokens
            output.scheduled_time = request.scheduled_time
        outputs[request.client_index].append(output)
        if request.status is RequestStatus.FINISHED:
            del self.requests[request.request_id]
            if request.grammar is not None:
                del self._with_grammar[request.request_id]
            self._some_ended = True
            if request.known_to_worker:
                self._finished_req_ids.append(request.request_id)

    def _drop_finished_from_running(self) -> None:
        if self._some_ended:
            self._some_ended = False
            self.running[:] = [request for request in self.running if not request.finished]

    # Invariants

    def check_integrity(self) -> None:
        """Every request is in exactly one place, and holds blocks exactly when it runs.

        Raises:
            AssertionError: an invariant is broken; the message names the request or block.
        """
        self.kv_cache.check_integrity()
        placed = [*self.waiting, *self.running, *self._compiling, *self._held, *self._ended_on_arrival]
        assert self._holds_new or not self._held, "requests are held though new ones are admitted"
        constrained = {request_id for request_id, request in self.requests.items() if request.grammar is not None}
        assert constrained == set(self._with_grammar), "grammars are kept of other requests than have one"
        ids = [request.request_id for request in placed]
        assert len(ids) == len(set(ids)), f"a request is in two queues: {sorted(ids)}"
        assert set(ids) == set(self.requests), f"lost requests: {set(self.requests) ^ set(ids)}"
        assert len(self.running) <= self.max_num_seqs, f"{len(self.running)} run, {self.max_num_seqs} may"
        for queue in (list(self.waiting), self.running):
            assert queue == sorted(queue, key=lambda request: request.order), "a queue is out of order"
        for request in self.running:
            assert request.status is RequestStatus.RUNNING, (
                f"{request.request_id} runs as {request.status.name}"
            )
            capacity = self.kv_cache.num_tokens_with_room(request)
            assert request.num_computed_tokens <= capacity, f"{request.request_id} computed beyond its blocks"
            assert request.num_computed_tokens <= request.num_schedulable_tokens < request.max_num_tokens
            num_underway = sum(planned.num_tokens_of(request) for planned in self._in_flight)
            assert request.num_confirmed_tokens + num_underway == request.num_computed_tokens, request.request_id
            num_placeholders = request.num_schedulable_tokens - request.num_tokens
            num_in_flight = sum(request in planned.requests for planned in self._in_flight)
            assert num_placeholders <= num_in_flight, f"{request.request_id} runs too far"
        for request in self.waiting:
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), request.status.name
            assert not self.kv_cache.block_ids(request), f"{request.request_id} waits and holds blocks"
            num_tokens = request.num_computed_tokens + request.num_confirmed_tokens
            assert num_tokens == 0, f"{request.request_id} waits with computed tokens"
        num_holders = sum(bool(self.kv_cache.block_ids(request)) for request in self.running)
        assert num_holders == self.kv_cache.num_holders, "someone who does not run holds blocks"


def _rows(lists: LogprobsLists, start: int, stop: int | None) -> LogprobsLists:
    return LogprobsLists(lists.token_ids[start:stop], lists.logprobs[start:stop], lists.ranks[start:stop])
