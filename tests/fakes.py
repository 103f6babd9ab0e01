"""Stand-ins that behave: a worker without a model that checks every plan it is given, and drivers for it.

`FakeWorker` keeps the books a real worker keeps (tokens, block tables, what was written where) from nothing but
the plans, so a plan that contradicts the last one, or lets attention read a block that another prefix wrote, is an
AssertionError. Its "model" is a hash of all tokens so far: the next token depends on each of them, and on the seed.
`answer_alone` computes the same answer without scheduler, blocks or batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from minivllm.config.engine import EngineConfig
from minivllm.core.sched.scheduler import Scheduler
from minivllm.engine.plans_in_flight import PlansInFlight
from minivllm.executor.abstract import Executor
from minivllm.messages.engine import EngineCoreOutput, EngineCoreRequest, FinishReason, LogprobsLists
from minivllm.messages.kv_cache import NULL_BLOCK, ONE_FULL_GROUP, KVCacheGroup, has_null_block
from minivllm.messages.worker import (
    GrammarOutput,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
    WorkerReady,
)
from minivllm.sampling_params import SamplingParams

# --- the model -------------------------------------------------------------------------------------------------


def extend_chain(chain: int, token_id: Any) -> int:
    """The "KV" of a position: it depends on every token (or vector) up to there, and on nothing else."""
    return hash((chain, token_id))


def chain_of(token_ids: list[Any]) -> list[int]:
    chains, chain = [], 0
    for token_id in token_ids:
        chain = extend_chain(chain, token_id)
        chains.append(chain)
    return chains


def _words(request: EngineCoreRequest | NewRequestData) -> list[Any]:
    """What the model reads at each position: a token, or the vector given in its place."""
    tokens, embeds = request.prompt_token_ids + request.prior_output_token_ids, request.prompt_embeds
    if embeds is None:
        return tokens
    # Numbers that no token has; of bytes Python's hash would be another in each process.
    vectors = [(1 << 40) + int.from_bytes(embeds.rows(i, i + 1), "little") for i in range(embeds.num_tokens)]
    return [*vectors, *tokens[len(vectors) :]]


def sample(chain: int, seed: int, masked: set[int], vocab_size: int) -> int:
    """The token that follows a prefix: any, but none that is masked."""
    token_id = hash((seed, chain)) % vocab_size
    while token_id in masked:
        token_id = (token_id + 1) % vocab_size
    return token_id


def masked_tokens(params: SamplingParams, eos_token_ids: list[int], num_output_tokens: int) -> set[int]:
    """What `min_tokens` forbids at this position."""
    if num_output_tokens >= params.min_tokens:
        return set()
    return {*eos_token_ids, *(params.stop_token_ids or ())}


def logprobs_rows(token_ids: list[int], chains: list[int]) -> LogprobsLists:
    """One row a token; the value depends on the whole prefix, the token included."""
    return LogprobsLists(
        [[token_id] for token_id in token_ids],
        [[-(chain % 1000) / 100] for chain in chains],
        [1] * len(chains),
    )


# --- the worker ------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """A request as the worker knows it. `tables`, one a KV cache group, is None between a preemption and the return."""

    tokens: list[int]
    chains: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    eos_token_ids: list[int]
    tables: list[list[int]] | None
    num_computed: int
    has_failed: bool = False  # its next token will never be known; plans that were made before go on over it

    @classmethod
    def from_message(cls, new: NewRequestData) -> _State:
        tokens = new.prompt_token_ids + new.prior_output_token_ids
        return cls(
            tokens, chain_of(_words(new)), len(new.prompt_token_ids), new.sampling_params, new.seed,
            new.eos_token_ids, [list(ids) for ids in new.block_ids], new.num_computed_tokens,
        )  # fmt: skip

    def append(self, token_id: int) -> None:
        self.tokens.append(token_id)
        self.chains.append(extend_chain(self.chains[-1], token_id))


class FakeWorker:
    """Applies plans and checks them. Give `failures` {request id: message} to make requests fail in their next step."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int = 64,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        groups: Sequence[KVCacheGroup] = ONE_FULL_GROUP,
    ) -> None:
        self.groups = groups
        self._has_null = has_null_block(groups)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.failures: dict[str, str] = {}
        self.states: dict[str, _State] = {}
        self.kv: dict[tuple[int, int], tuple[int, int]] = {}  # (block, offset) -> (group, chain)
        self.num_computed_tokens = 0  # all work done, recomputation included
        self._next_step = 0

    def run(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Apply, compute and sample one plan.

        Raises:
            AssertionError: the plan is inconsistent with what came before, or would make attention read garbage.
        """
        assert plan.step == self._next_step, f"step {plan.step} came, {self._next_step} was expected"
        self._next_step += 1
        self._apply(plan)
        self._check_budgets(plan)
        self._forget_what_windows_passed()
        self._check_writable(plan)
        for request_id, num_new in plan.num_scheduled_tokens.items():
            self._check_readable(request_id, self.states[request_id].num_computed)
            self._check_tables(request_id, num_new)
            assert num_new > 0, f"{request_id}: {num_new} tokens scheduled"
        for request_id, num_new in plan.num_scheduled_tokens.items():
            self._write(request_id, num_new)
        for request_id, num_new in plan.num_scheduled_tokens.items():
            self._check_readable(request_id, self.states[request_id].num_computed + num_new)
        return self._sample(plan)

    def sleep(self, level: int) -> None:
        """The cache's content is gone; the next plan says whose blocks were."""
        self.kv.clear()

    def wake_up(self, parts: Sequence[str]) -> None:
        pass

    def _apply(self, plan: SchedulerOutput) -> None:
        for request_id in plan.finished_req_ids:
            assert request_id in self.states, f"{request_id} finished and was never known"
            del self.states[request_id]
        for request_id in plan.preempted_req_ids:
            assert self.states[request_id].tables is not None, f"{request_id} preempted twice"
            self.states[request_id].tables = None
        for new in plan.scheduled_new_reqs:
            assert new.request_id not in self.states, f"{new.request_id} is not new"
            self.states[new.request_id] = _State.from_message(new)
        cached = plan.scheduled_cached_reqs
        columns = (cached.request_ids, cached.new_block_ids, cached.resumed, cached.num_computed_tokens)
        assert len({len(column) for column in columns}) == 1, "columns of unequal length"
        for request_id, block_ids, resumed, num_computed in zip(*columns):
            self._apply_cached(self.states[request_id], request_id, block_ids, resumed, num_computed)
        named = [new.request_id for new in plan.scheduled_new_reqs] + cached.request_ids
        assert sorted(named) == sorted(plan.num_scheduled_tokens), "scheduled and described requests differ"

    def _apply_cached(
        self, state: _State, request_id: str, block_ids: list[list[int]], resumed: bool, num_computed: int
    ) -> None:
        if resumed:
            assert state.tables is None, f"{request_id} resumed and was not preempted"
            state.tables, state.num_computed = [list(ids) for ids in block_ids], num_computed
            return
        assert state.tables is not None, f"{request_id} continues and has no blocks"
        assert state.num_computed == num_computed, (
            f"{request_id}: {num_computed} != {state.num_computed} computed"
        )
        assert len(block_ids) in (0, len(self.groups)), f"{request_id}: blocks for {len(block_ids)} groups"
        for table, new_ids in zip(state.tables, block_ids):
            table += new_ids

    def _check_budgets(self, plan: SchedulerOutput) -> None:
        total = sum(plan.num_scheduled_tokens.values())
        assert total == plan.total_num_scheduled_tokens, f"{total} != {plan.total_num_scheduled_tokens}"
        if self.max_num_batched_tokens is not None:
            assert total <= self.max_num_batched_tokens, f"{total} tokens in a step"
        if self.max_num_seqs is not None:
            assert len(plan.num_scheduled_tokens) <= self.max_num_seqs, "too many requests in a step"
        for request_id, num_new in plan.num_scheduled_tokens.items():
            state = self.states[request_id]
            end = state.num_computed + num_new
            assert state.has_failed or end <= len(state.tokens), f"{request_id}: token {end} is not known yet"

    def _check_tables(self, request_id: str, num_new: int) -> None:
        """One table a group, long enough, whose blocks are real wherever this step reads or writes."""
        state, size = self.states[request_id], self.block_size
        assert len(state.tables) == len(self.groups), f"{request_id} has {len(state.tables)} tables"
        end = state.num_computed + num_new
        for table, group in zip(state.tables, self.groups):
            assert end <= len(table) * size, f"{request_id}: token {end} has no block"
            used = table[group.num_passed_blocks(state.num_computed, size) : -(-end // size)]
            assert not self._has_null or NULL_BLOCK not in used, f"{request_id}: a block in use is null: {table}"

    def _forget_what_windows_passed(self) -> None:
        """A real worker keeps the ids, and reads them never again; here nothing may be left that could be read."""
        for state in self.states.values():
            for table, group in zip(state.tables or (), self.groups):
                num_passed = group.num_passed_blocks(state.num_computed, self.block_size)
                table[:num_passed] = [NULL_BLOCK] * num_passed

    def _check_writable(self, plan: SchedulerOutput) -> None:
        """A block written to in this step is in one live block table only."""
        num_holders: dict[int, int] = {}
        for request_id, state in self.states.items():
            block_ids = [block_id for table in state.tables or () for block_id in table]
            if self._has_null:
                block_ids = [block_id for block_id in block_ids if block_id != NULL_BLOCK]
            assert len(set(block_ids)) == len(block_ids), f"{request_id} holds a block twice: {block_ids}"
            for block_id in block_ids:
                assert 0 <= block_id < self.num_blocks, f"{request_id}: there is no block {block_id}"
                num_holders[block_id] = num_holders.get(block_id, 0) + 1
        for request_id, num_new in plan.num_scheduled_tokens.items():
            state = self.states[request_id]
            first, last = state.num_computed, state.num_computed + num_new - 1
            written = slice(first // self.block_size, last // self.block_size + 1)
            for block_id in [block_id for table in state.tables for block_id in table[written]]:
                assert num_holders[block_id] == 1, (
                    f"{request_id} writes to block {block_id}, which others hold"
                )

    def _check_readable(self, request_id: str, num_tokens: int) -> None:
        """What attention reads among the first `num_tokens` positions was written by this very prefix, for this group.

        Queries start at num_computed: a window reads nothing that lies further behind.
        """
        state = self.states[request_id]
        for number, (table, group) in enumerate(zip(state.tables, self.groups)):
            window = group.sliding_window
            first = 0 if window is None else max(0, state.num_computed - window + 1)
            for position in range(num_tokens if state.has_failed else first, num_tokens):
                slot = (table[position // self.block_size], position % self.block_size)
                assert self.kv.get(slot) == (number, state.chains[position]), (
                    f"{request_id}: wrong KV at {position}, slot {slot}, group {number}"
                )

    def _write(self, request_id: str, num_new: int) -> None:
        state = self.states[request_id]
        for number, table in enumerate(state.tables):
            for position in range(state.num_computed, state.num_computed + num_new):
                slot = (table[position // self.block_size], position % self.block_size)
                self.kv[slot] = (-1, -1) if state.has_failed else (number, state.chains[position])
        self.num_computed_tokens += num_new

    def _sample(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        result = ModelRunnerOutput()
        for request_id, num_new in plan.num_scheduled_tokens.items():
            state = self.states[request_id]
            result.request_ids.append(request_id)
            self._add_prompt_logprobs(request_id, state, num_new, result)
            state.num_computed += num_new
            error = self.failures.pop(request_id, None)
            if error is not None:
                result.failed[request_id] = error
                self._spoil(state, num_new)
                state.has_failed = True
            if state.has_failed or state.num_computed < len(state.tokens):
                result.sampled_token_ids.append([])
                continue
            num_output_tokens = len(state.tokens) - state.num_prompt_tokens
            assert num_output_tokens < (state.params.max_tokens or 1 << 40), f"{request_id}: beyond its max_tokens"
            assert len(state.tokens) < (self.max_model_len or 1 << 40), f"{request_id}: beyond max_model_len"
            masked = masked_tokens(state.params, state.eos_token_ids, num_output_tokens)
            token_id = sample(state.chains[-1], state.seed, masked, self.vocab_size)
            state.append(token_id)
            result.sampled_token_ids.append([token_id])
            if state.params.logprobs is not None:
                result.logprobs[request_id] = logprobs_rows([token_id], state.chains[-1:])
        return result

    def _spoil(self, state: _State, num_new: int) -> None:
        """A failed request's KV is in doubt: whoever reads what this step wrote must fail a check."""
        for table in state.tables:
            for position in range(state.num_computed - num_new, state.num_computed):
                self.kv[table[position // self.block_size], position % self.block_size] = (-1, -1)

    def _add_prompt_logprobs(
        self, request_id: str, state: _State, num_new: int, result: ModelRunnerOutput
    ) -> None:
        """Computing positions a … b-1 yields rows for prompt positions a+1 … b, as far as the prompt goes."""
        if state.params.prompt_logprobs is None:
            return
        first = state.num_computed + 1
        last = min(state.num_computed + num_new, state.num_prompt_tokens - 1)
        if first <= last:
            rows = logprobs_rows(state.tokens[first : last + 1], state.chains[first : last + 1])
            result.prompt_logprobs[request_id] = rows


# --- the executor ----------------------------------------------------------------------------------------------


class Inline:
    """Runs each plan when it comes, as a `Runner` of one's own worker."""

    def __init__(self, run: Callable[[SchedulerOutput], ModelRunnerOutput]) -> None:
        self._run = run
        self.results: deque[Future[ModelRunnerOutput]] = deque()

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        self.results.append(_attempt(self._run, plan))
        return _attempt(lambda: None)

    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        return self.results.popleft()


class FakeExecutor(Executor):
    """A `FakeWorker` behind the executor's five verbs. Sizes come from the config, or are small.

    It has as many plans in flight as the real ones. Subclass it to misbehave; with `--distributed-executor-backend
    tests.fakes:FakeExecutor` it runs in a core.
    """

    def __init__(self, config: EngineConfig, **callbacks: Any) -> None:
        super().__init__(config, **callbacks)
        self.max_concurrent_batches = config.scheduler.max_plans_in_flight(leaves_host_free=False)

    def initialize(self) -> WorkerReady:
        config = self.config
        block_size = config.cache.block_size or 16
        asked_len = config.model.max_model_len
        max_model_len = asked_len if isinstance(asked_len, int) else 256
        num_blocks = config.cache.num_gpu_blocks_override or 4 * -(-max_model_len // block_size)
        max_num_batched_tokens = config.scheduler.max_num_batched_tokens or max(256, max_model_len)
        max_num_seqs = config.scheduler.max_num_seqs or min(64, max_num_batched_tokens)
        self.on_progress("laying out an imaginary KV cache")
        self.worker = FakeWorker(
            num_blocks=num_blocks,
            block_size=block_size,
            vocab_size=config.hf_config.vocab_size,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
        )
        self._inline = Inline(self.worker.run)
        return WorkerReady(
            max_model_len=max_model_len,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_cache_bytes=num_blocks * block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            dtype="fake",
            numerics_id="fake",
        )

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        return self._inline.execute_model(plan)

    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        return self._inline.sample_tokens(grammar)

    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        return [getattr(self.worker, method)(*args)]

    def shutdown(self) -> None:
        pass


def _attempt(function: Callable[..., Any], *args: Any) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args))
    except BaseException as error:
        future.set_exception(error)
    return future


# --- driving a scheduler ---------------------------------------------------------------------------------------


@dataclass
class Answer:
    """All outputs of one request, put together. `num_ends` must come to 1."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    error_param: str | None = None
    num_ends: int = 0
    num_cached_tokens: int = 0
    scheduled_time: float | None = None
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, float]] = field(
        default_factory=list
    )  # (prompt token, logprob) of 1, 2, …
    client_index: int | None = None

    def add(self, output: EngineCoreOutput, client_index: int) -> None:
        assert self.num_ends == 0, f"{output.request_id} was answered after its end"
        assert self.client_index in (None, client_index), f"{output.request_id} changed its client"
        self.client_index = client_index
        self.token_ids += output.new_token_ids
        self.num_cached_tokens += output.num_cached_tokens
        if output.scheduled_time is not None:
            assert self.scheduled_time is None, f"{output.request_id} was scheduled first twice"
            self.scheduled_time = output.scheduled_time
        if output.new_logprobs is not None:
            assert len(output.new_logprobs.ranks) == len(output.new_token_ids)
            self.logprobs += [row[0] for row in output.new_logprobs.logprobs]
        if output.new_prompt_logprobs is not None:
            rows = zip(output.new_prompt_logprobs.token_ids, output.new_prompt_logprobs.logprobs)
            self.prompt_logprobs += [(ids[0], values[0]) for ids, values in rows]
        if output.finish_reason is not None:
            self.num_ends += 1
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
            self.error, self.error_param = output.error, output.error_param


class Driver:
    """A scheduler and a fake worker in the engine core's loop, with integrity checked each step.

    `num_in_flight` plans at most are made before the result of the first is accounted for.
    """

    def __init__(self, scheduler: Scheduler, *, vocab_size: int = 64, num_in_flight: int = 1) -> None:
        self.scheduler = scheduler
        self.worker = FakeWorker(
            num_blocks=len(scheduler.kv_cache.pool.blocks),
            block_size=scheduler.kv_cache.block_size,
            vocab_size=vocab_size,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=scheduler.max_model_len,
            groups=scheduler.kv_cache.groups,
        )
        self.answers: dict[str, Answer] = {}
        self.plans: list[SchedulerOutput] = []  # in the order of their results
        self.in_flight = PlansInFlight(scheduler, Inline(self._run), num_in_flight)

    def add(self, request: EngineCoreRequest) -> None:
        self.scheduler.add_request(request)
        self.answers[request.request_id] = Answer()

    def abort(self, *request_ids: str) -> None:
        self._collect(self.scheduler.abort_requests(request_ids))

    def step(self, *, abort_meanwhile: Iterable[str] = (), now: float = 0.0) -> SchedulerOutput:
        """Plan, and account for the oldest plan; `abort_meanwhile` are aborts that arrive while the worker computes."""
        self.in_flight.fill(now)
        if not self.in_flight:
            return SchedulerOutput(-1)  # nobody asks for anything
        plan, outputs = self.in_flight.account_for_oldest(lambda: self.abort(*abort_meanwhile))
        self._collect(outputs)
        self.scheduler.check_integrity()
        self.plans.append(plan)
        return plan

    def _run(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        self.scheduler.check_integrity()
        return self.worker.run(plan)

    def run(self, max_steps: int = 10_000) -> dict[str, Answer]:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_requests() and not self.in_flight:
                self.check_idle()
                return self.answers
            self.step()
        raise AssertionError(f"no end after {max_steps} steps: {sorted(self.scheduler.requests)}")

    def check_idle(self) -> None:
        """Nothing runs: no block held, nothing remembered by the worker, every request ended once."""
        assert self.scheduler.kv_cache.pool.usage == 0, "blocks are held while nothing runs"
        assert not self.worker.states, f"the worker still remembers {sorted(self.worker.states)}"
        unanswered = [request_id for request_id, answer in self.answers.items() if answer.num_ends != 1]
        assert not unanswered, f"ended other than once: {unanswered}"

    def _collect(self, outputs_by_client: dict[int, list[EngineCoreOutput]]) -> None:
        for client_index, outputs in outputs_by_client.items():
            for output in outputs:
                self.answers[output.request_id].add(output, client_index)


def drive(
    scheduler: Scheduler, requests: Iterable[EngineCoreRequest] = (), **options: Any
) -> dict[str, Answer]:
    """Add requests, run to the end, and return the answers."""
    driver = Driver(scheduler, **options)
    for request in requests:
        driver.add(request)
    return driver.run()


def answer_alone(request: EngineCoreRequest, *, max_model_len: int, vocab_size: int = 64) -> Answer:
    """What a request must be answered, whatever else runs: the rules once more, without a scheduler."""
    params, answer = request.sampling_params, Answer(num_ends=1)
    tokens = request.prompt_token_ids + request.prior_output_token_ids
    eos = [] if params.ignore_eos else request.eos_token_ids
    num_prior = len(request.prior_output_token_ids)
    chains = chain_of(_words(request))
    if params.prompt_logprobs is not None:
        answer.prompt_logprobs = [
            (tokens[p], -(chains[p] % 1000) / 100) for p in range(1, len(request.prompt_token_ids))
        ]
    while True:
        num_output = len(tokens) - len(request.prompt_token_ids)
        if num_output > params.min_tokens and tokens[-1] in eos:
            answer.finish_reason = FinishReason.STOP
        elif num_output > params.min_tokens and tokens[-1] in params.stop_token_ids:
            answer.finish_reason, answer.stop_reason = FinishReason.STOP, tokens[-1]
        elif num_output and (num_output == (params.max_tokens or -1) or len(tokens) == max_model_len):
            answer.finish_reason = FinishReason.LENGTH
        if answer.finish_reason is not None:
            answer.token_ids = tokens[len(request.prompt_token_ids) + num_prior :]
            return answer
        masked = masked_tokens(params, request.eos_token_ids, num_output)
        tokens.append(sample(chains[-1], request.seed, masked, vocab_size))
        chains.append(extend_chain(chains[-1], tokens[-1]))
        if params.logprobs is not None:
            answer.logprobs.append(-(chains[-1] % 1000) / 100)
