"""The engine itself: scheduler and executor, one step at a time.

Owns the loop over plans (plans_in_flight.py) and what still has to be told to clients. Knows nothing of sockets,
threads or processes; `core_process.py` puts it into a process, `core_client.InprocClient` into the caller's.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from minivllm.config.engine import EngineConfig
from minivllm.config.kv_events import read_kv_events_config
from minivllm.config.structured_outputs import read_structured_outputs_config
from minivllm.core.sched.scheduler import Scheduler
from minivllm.engine.kv_events import KVEventPublisher
from minivllm.engine.plans_in_flight import PlansInFlight
from minivllm.engine.structured import LazyGrammars
from minivllm.exceptions import ConfigError, ConflictError, RequestError
from minivllm.executor.abstract import get_executor_class
from minivllm.logger import init_logger
from minivllm.messages.codec import encode
from minivllm.messages.engine import (
    SLEEPING_PARTS,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreReady,
    EngineCoreRequest,
    FinishReason,
    PauseMode,
    UtilityOutput,
    UtilityRequest,
)
from minivllm.messages.kv_cache import num_tokens_held
from minivllm.messages.stats import EngineSnapshot
from minivllm.messages.worker import WorkerReady

logger = init_logger(__name__)

_IDLE_SLEEP_S = 0.001  # when requests wait for something other than compute


class EngineCore:
    """Schedules, runs and accounts for batches until no request is left.

    Raises (on construction):
        ConfigError, ModelFilesError: the model cannot be served as asked.
    """

    UTILITIES = (
        "reset_prefix_cache", "collective_rpc", "sleep", "wake_up", "is_sleeping", "start_profile", "stop_profile",
        "snapshot", "pause", "resume", "is_paused", "is_coming_to_rest", "hold_for_sleep", "end_hold",
    )  # fmt: skip

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_death: Callable[[str], None],
        on_progress: Callable[[str], None],
    ) -> None:
        kv_events = read_kv_events_config(config.observability.kv_events_config)
        executor_class = get_executor_class(config.parallel.distributed_executor_backend)
        self.log_stats = not config.observability.disable_log_stats
        self.executor = executor_class(config, on_death=on_death, on_progress=on_progress)
        if config.scheduler.async_scheduling and self.executor.max_concurrent_batches < 2:
            raise ConfigError(
                f"--async-scheduling needs an executor that takes a plan while another runs, and "
                f"{executor_class.__name__} does not; leave it out"
            )
        self._grammars = None if config.model.skip_tokenizer_init else LazyGrammars(config)
        preload = read_structured_outputs_config(config.structured_outputs.structured_outputs_config).preload
        self._may_read_vocabulary = self._grammars is not None and preload is None  # once there is time
        try:
            worker = self.executor.initialize()
            if preload and self._grammars is not None:
                on_progress("reading the vocabulary for structured outputs")
                self._grammars.preload()
            self.scheduler = Scheduler(
                max_num_batched_tokens=worker.max_num_batched_tokens,
                max_num_seqs=worker.max_num_seqs,
                max_model_len=worker.max_model_len,
                num_blocks=worker.num_blocks,
                block_size=worker.block_size,
                kv_cache_groups=worker.kv_cache_groups,
                max_plans_in_flight=self.executor.max_concurrent_batches,
                enable_prefix_caching=config.cache.enable_prefix_caching,
                enable_chunked_prefill=config.scheduler.enable_chunked_prefill,
                prefix_caching_hash_algo=config.cache.prefix_caching_hash_algo,
                hash_secret=b"" if config.cache.prefix_caching_hash_algo == "sha256" else os.urandom(16),
                record_kv_events=kv_events.publishes,
                policy=config.scheduler.scheduling_policy,
                max_num_active_seqs=config.scheduler.max_num_active_seqs,
                long_prefill_token_threshold=config.scheduler.long_prefill_token_threshold,
                max_num_mixed_prefill_tokens=config.scheduler.max_num_mixed_prefill_tokens,
                watermark=config.scheduler.watermark,
                reserve_full_isl=config.scheduler.scheduler_reserve_full_isl,
                grammars=self._grammars,
            )
            self._kv_events = KVEventPublisher(kv_events) if kv_events.publishes else None
        except BaseException:
            self.executor.shutdown()
            raise
        self.ready = _ready_message(worker, config.hf_config.vocab_size, self.executor.max_concurrent_batches)
        self._plans = PlansInFlight(self.scheduler, self.executor, self.executor.max_concurrent_batches)
        self._untold: defaultdict[int, list[EngineCoreOutput]] = defaultdict(
            list
        )  # by client; for the next step
        self._sleep_level = 0
        self._asleep: set[str] = set()  # those of SLEEPING_PARTS that are not back; until then requests wait
        self._pause_mode: PauseMode | None = None
        self._holds: set[str] = set()  # of those who want the engine to sleep once nothing runs

    def add_request(self, request: EngineCoreRequest) -> None:
        """Take a request. One the scheduler refuses is answered with an error by the next step."""
        try:
            self.scheduler.add_request(request)
        except RequestError as error:
            self.reject(request.request_id, request.client_index, str(error), param=error.param)

    def reject(
        self,
        request_id: str,
        client_index: int,
        reason: str,
        how: FinishReason = FinishReason.ERROR,
        *,
        param: str | None = None,
    ) -> None:
        """Answer a request that never reaches the scheduler. param: its field at fault, if one is."""
        error = reason if how is FinishReason.ERROR else None
        self._untold[client_index].append(
            EngineCoreOutput(request_id=request_id, finish_reason=how, error=error, error_param=param)
        )

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End these requests; ids that are not (or no longer) known are ignored."""
        for client_index, outputs in self.scheduler.abort_requests(request_ids).items():
            self._untold[client_index] += outputs

    def abort_all(self) -> dict[int, EngineCoreOutputs]:
        """End every request; what each client should hear. There may be no step after it."""
        self.abort_requests(list(self.scheduler.requests))
        return self._address({})

    def has_requests(self) -> bool:
        """Whether a step has anything to do."""
        if self._untold or self._plans:
            return True
        return not self._is_frozen and self.scheduler.has_requests()

    def on_idle(self) -> None:
        """There has been nothing to do for a while: time for what would disturb requests later."""
        if self._may_read_vocabulary:
            self._may_read_vocabulary = False
            self._grammars.preload_meanwhile()

    @property
    def _is_frozen(self) -> bool:
        """No plan is made, whoever waits or runs."""
        return bool(self._asleep) or self._pause_mode in ("abort", "keep")

    def step(self, apply_late_aborts: Callable[[], None] = lambda: None) -> dict[int, EngineCoreOutputs]:
        """Schedule, run, and account for one batch; what each client should hear, by client_index.

        With several plans in flight the batch accounted for is the oldest; the youngest was planned while it ran.
        apply_late_aborts: called after the batch ran and before its results are accounted for.
        """
        outputs: dict[int, list[EngineCoreOutput]] = {}
        if not self._is_frozen:
            self._plans.fill(time.monotonic())
        if self._plans:
            plan, outputs = self._plans.account_for_oldest(apply_late_aborts)
            if not plan.num_scheduled_tokens and not self._plans and self.scheduler.has_unfinished_requests():
                time.sleep(_IDLE_SLEEP_S)
        self._publish_kv_events()
        return self._address(outputs)

    def _publish_kv_events(self) -> None:
        if self._kv_events is not None and (events := self.scheduler.take_kv_events()):
            self._kv_events.publish(events)

    def _address(self, outputs: dict[int, list[EngineCoreOutput]]) -> dict[int, EngineCoreOutputs]:
        """One message per client that has something to hear; client 0 hears the statistics of every step."""
        untold, self._untold = self._untold, defaultdict(list)
        now = time.monotonic()
        clients = {*untold, *outputs, *([0] if self.log_stats else [])}
        messages = {
            client: EngineCoreOutputs(outputs=untold.get(client, []) + outputs.get(client, []), timestamp=now)
            for client in clients
        }
        if self.log_stats:
            stats = messages[0].scheduler_stats = self.scheduler.make_stats()
            stats.sleep_level = self._sleep_level
        return messages

    def call_utility(self, request: UtilityRequest) -> UtilityOutput:
        """Call one of UTILITIES; what it raises becomes the answer's `failure`, or its `conflict`."""
        if request.method not in self.UTILITIES:
            return UtilityOutput(
                request.call_id, failure=f"the engine core has no utility {request.method!r}"
            )
        try:
            return UtilityOutput(request.call_id, result=getattr(self, request.method)(*request.args))
        except ConflictError as error:
            return UtilityOutput(request.call_id, conflict=error.message)
        except Exception as error:
            logger.exception("utility %s failed", request.method)
            return UtilityOutput(request.call_id, failure=f"{type(error).__name__}: {error}")

    def reset_prefix_cache(self, running_too: bool = False) -> bool:
        """Forget every cached block; False while a request still holds one.

        running_too: take the blocks of running requests as well, which compute again what they had.
        """
        if running_too:
            self._preempt_all()
        done = self.scheduler.reset_prefix_cache()
        self._publish_kv_events()
        return done

    def collective_rpc(self, method: str, args: Sequence[Any]) -> list[Any]:
        """Call a method on every worker; an answer that cannot be sent is given as its text."""
        answers = self.executor.collective_rpc(method, tuple(args))
        return [answer if _is_sendable(answer) else str(answer) for answer in answers]

    # Pause and sleep. Each holds requests for itself: they go on when the engine is neither paused nor asleep. What
    # waits for requests to end is refused where they stand still, and while it waits, so is what would have them do so.

    def pause(self, mode: PauseMode) -> None:
        """Begin with no request until `resume`; those that come wait. The engine may be busy a little longer, see
        `is_coming_to_rest`.

        abort: open requests end. wait: those that have begun go on to their end, queued ones wait.
        keep: all stay where they are, and go on after `resume`.

        Raises:
            ConflictError: wait, and they sleep; keep, and a sleep waits for them.
        """
        if mode == "wait" and self._asleep:
            self._refuse_if_begun(
                "the engine sleeps amid requests, which cannot end now; wake it up first, or pause with mode=keep or "
                "abort"
            )
        if mode == "keep" and self._holds:
            self._refuse_if_begun("a sleep waits for requests to end; pause with mode=wait or abort")
        if mode == "abort":
            self.abort_requests(list(self.scheduler.requests))
        self._pause_mode = mode
        self._hold_or_admit()

    def resume(self) -> None:
        self._pause_mode = None
        self._hold_or_admit()

    def is_paused(self) -> bool:
        return self._pause_mode is not None

    def is_coming_to_rest(self) -> bool:
        """Paused, or about to sleep, and something that may happen before has not happened yet."""
        return (self._pause_mode is not None or bool(self._holds)) and self.has_requests()

    def hold_for_sleep(self, holder: str) -> None:
        """Begin with no request until `end_hold`: those that have begun go on to their end, and `sleep` can follow.

        Raises:
            ConflictError: they are kept by a pause, or asleep already.
        """
        if self._is_frozen:
            state = "sleeps" if self._asleep else "is paused"
            self._refuse_if_begun(
                f"the engine {state} amid requests, which cannot end now; sleep with mode=keep or abort"
            )
        self._holds.add(holder)
        self._hold_or_admit()

    def end_hold(self, holder: str) -> None:
        self._holds.discard(holder)
        self._hold_or_admit()

    def _hold_or_admit(self) -> None:
        if self._holds or self._pause_mode == "wait":
            self.scheduler.hold_new()
        else:
            self.scheduler.admit_new()  # what was held; while the engine stands still, nothing is planned all the same

    def _refuse_if_begun(self, why: str) -> None:
        if self.scheduler.has_begun_requests():
            raise ConflictError(why)

    def sleep(self, level: int, abort: bool) -> None:
        """Give back the KV cache's memory, at level 2 the weights' too.

        Open requests are aborted, or wait like those that come, and go on after `wake_up` from the tokens they have.

        Raises:
            ConflictError: they are not aborted, and a pause or another sleep waits for them to end.
        """
        if not abort and not self._is_frozen and (self._holds or self._pause_mode == "wait"):
            self._refuse_if_begun("a pause or a sleep waits for requests to end; sleep with mode=wait or abort")
        if abort:
            self.abort_requests(list(self.scheduler.requests))
        is_empty = self.reset_prefix_cache(running_too=True)  # not within the assert, which python -O leaves out
        assert is_empty, "a block is held though nothing runs"
        self.executor.collective_rpc("sleep", (level,))
        self._sleep_level = max(level, self._sleep_level)
        self._asleep = set(SLEEPING_PARTS)
        self._tell_statistics()

    def _preempt_all(self) -> None:
        """What is in flight is accounted for first; its outputs are told with the next step's."""
        while self._plans:
            _, by_client = self._plans.account_for_oldest()
            for client_index, outputs in by_client.items():
                self._untold[client_index] += outputs
        self.scheduler.preempt_all()

    def wake_up(self, parts: Sequence[str]) -> bool:
        """Have these of SLEEPING_PARTS again; whether all are back, and requests go on."""
        if self._asleep.intersection(parts):
            self.executor.collective_rpc("wake_up", (list(parts),))
        self._asleep.difference_update(parts)
        if not self._asleep:
            self._sleep_level = 0
            self._tell_statistics()
        return not self._asleep

    def _tell_statistics(self) -> None:
        """Have a step, which asks nothing of the workers but sends them."""
        self._untold[0] += []

    def is_sleeping(self) -> bool:
        return bool(self._asleep)

    # Profile

    def start_profile(self, prefix: str, delay: int | None, most: int | None) -> bool:
        """Record what the workers do; False while they do."""
        return all(self.executor.collective_rpc("start_profile", (prefix, delay, most)))

    def stop_profile(self) -> list[str]:
        """The files written."""
        return [path for files in self.executor.collective_rpc("stop_profile") for path in files]

    def snapshot(self) -> EngineSnapshot:
        """How the engine stands, between two steps."""
        return self.scheduler.snapshot()

    def shutdown(self) -> None:
        self.executor.shutdown()
        if self._grammars is not None:
            self._grammars.shutdown()
        if self._kv_events is not None:
            self._kv_events.shutdown()


def _is_sendable(value: Any) -> bool:
    try:
        encode(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _ready_message(worker: WorkerReady, vocab_size: int, max_plans_in_flight: int) -> EngineCoreReady:
    num_tokens = num_tokens_held(
        worker.kv_cache_groups,
        worker.num_blocks,
        worker.max_model_len,
        worker.max_num_batched_tokens * max_plans_in_flight,
        worker.block_size,
    )
    return EngineCoreReady(
        max_model_len=worker.max_model_len,
        num_gpu_blocks=worker.num_blocks,
        block_size=worker.block_size,
        kv_cache_bytes=worker.kv_cache_bytes,
        max_num_seqs=worker.max_num_seqs,
        max_num_batched_tokens=worker.max_num_batched_tokens,
        dtype=worker.dtype,
        vocab_size=vocab_size,
        kv_cache_size_tokens=num_tokens,
        kv_cache_max_concurrency=num_tokens / worker.max_model_len,
        numerics_id=worker.numerics_id,
    )
