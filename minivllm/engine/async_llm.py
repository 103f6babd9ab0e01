"""The engine for an event loop: what the API server, and any asyncio program, talks to.

Owns the life of a request in the front end: processed, sent, its outputs handed to its generator, aborted
when that is closed. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import msgspec

from minivllm.config.engine import EngineConfig
from minivllm.engine.core_client import AsyncMPClient
from minivllm.engine.front import StatLogger, check_sleep, check_tags, load_tokenizer, submit
from minivllm.engine.output_processor import OutputProcessor, RequestOutputCollector
from minivllm.engine.processor import Processor, Prompt, default_sampling_params
from minivllm.exceptions import EngineDeadError, QueueFullError
from minivllm.logger import init_logger
from minivllm.logits_processors import load_logits_processors
from minivllm.messages.engine import EngineCoreOutputs, EngineCoreRequest, PauseMode
from minivllm.messages.stats import EngineSnapshot, IterationStats
from minivllm.outputs import RequestOutput, SampleLogprobs
from minivllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minivllm.engine.arg_utils import AsyncEngineArgs

logger = init_logger(__name__)

T = TypeVar("T")

_LAST_OUTPUTS_S = 1.0  # for the loop to handle what the core said last
_LOOK_EVERY_S = 0.02  # whether a paused engine has come to rest
_QUIET_LOOKS, _QUIET_LOOK_S = 4, 0.5  # so many looks in a row that find no request: nobody wants anything
_CHUNK = 128  # outputs processed before other tasks of the loop get a turn


class AsyncLLM:
    """A running engine. Build it with `from_engine_args` or `from_engine_config`, end it with `shutdown`."""

    def __init__(
        self, config: EngineConfig, *, stat_loggers: Sequence[StatLogger] = (), **core_options: Any
    ) -> None:
        """Start the core and wait until it serves. core_options: see AsyncMPClient, for several API servers.

        Raises:
            ConfigError, EngineStartError: it cannot; nothing is left behind.
        """
        self.config = config
        self.engine_core = AsyncMPClient(config, **core_options)
        try:
            self.tokenizer = load_tokenizer(config)  # while the core loads the model
            load_logits_processors(config.model.logits_processors)  # the slow import, meanwhile
            self.ready = self.engine_core.wait_ready()
        except BaseException:
            self.engine_core.shutdown()
            raise
        self.default_sampling_params = default_sampling_params(config.generation_config)
        self.processor = Processor(config, self.ready, self.tokenizer)
        self.output_processor = OutputProcessor(
            self.tokenizer, stream_interval=config.scheduler.stream_interval
        )
        self._stat_loggers = list(stat_loggers)
        self._num_processing = 0  # requests that no core has seen yet, children counted
        self._rejected_by: list[str] = []  # since the last message of the core
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
        # Waits for the process that compiles constraints, which may take seconds over one.
        self._checking = ThreadPoolExecutor(max_workers=1, thread_name_prefix="check-grammars")
        self._output_handler: asyncio.Task | None = None
        self._idle_watch: asyncio.Task | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dead: asyncio.Event = asyncio.Event()
        self._handled_all = threading.Event()
        self._is_shut_down = False

    @classmethod
    def from_engine_args(
        cls, engine_args: AsyncEngineArgs, *, stat_loggers: Sequence[StatLogger] = ()
    ) -> AsyncLLM:
        """Check the arguments, start the core, wait until it serves."""
        return cls(engine_args.create_engine_config("serve"), stat_loggers=stat_loggers)

    @classmethod
    def from_engine_config(
        cls, config: EngineConfig, *, stat_loggers: Sequence[StatLogger] = (), **core_options: Any
    ) -> AsyncLLM:
        """Start the core and wait until it serves. Blocks; may run in any thread."""
        return cls(config, stat_loggers=stat_loggers, **core_options)

    # -- requests

    async def generate(
        self,
        prompt: Prompt | EngineCoreRequest,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        prior_logprobs: SampleLogprobs | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a prompt: outputs as `sampling_params.output_kind` says, the last one finished.

        An EngineCoreRequest is a resend: it goes on where its prior output ends, whose rows of logprobs, if
        any were asked for, are handed over in `prior_logprobs`.

        Closing the generator, or cancelling its consumer, aborts the request.

        Raises:
            RequestError: the request is at fault. The engine has not seen it, or found out as it ran: where its
                constraints leave no token.
            EngineGenerateError: this request failed in the engine.
            EngineDeadError: the engine is gone.
        """
        self._start_reading()
        self._raise_if_dead()
        self._num_processing += sampling_params.n
        try:
            request, text = await self._process(prompt, sampling_params, request_id, priority)
        finally:
            self._num_processing -= sampling_params.n
        self._raise_if_dead()
        collector = RequestOutputCollector(sampling_params.output_kind)
        ids = submit(
            request,
            self.engine_core,
            self.output_processor,
            external_id=request_id,
            prompt=text,
            collector=collector,
            prior_logprobs=prior_logprobs,
        )
        finished = False
        try:
            while not finished:
                output = await collector.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._abort(ids)

    def check_admission(self, num_requests: int = 1) -> None:
        """Whether so many requests more may be queued; to be asked right before `generate`, which does not.

        Raises:
            QueueFullError: --max-num-queued-reqs or --max-num-queued-tokens is reached.
        """
        limits, waiting = self.config.scheduler, self.output_processor
        if limits.max_num_queued_reqs is not None:
            num_open = waiting.num_unfinished_requests + self._num_processing
            if num_open + num_requests > limits.max_num_queued_reqs:
                self._reject(
                    "max_num_queued_reqs",
                    f"{num_open} requests are open and --max-num-queued-reqs allows {limits.max_num_queued_reqs}",
                )
        if limits.max_num_queued_tokens is not None:
            num_tokens = waiting.num_prompt_tokens_without_answer()
            if num_tokens >= limits.max_num_queued_tokens:
                self._reject(
                    "max_num_queued_tokens",
                    f"{num_tokens} prompt tokens wait and --max-num-queued-tokens is {limits.max_num_queued_tokens}",
                )

    def _reject(self, reason: str, why: str) -> NoReturn:
        self._rejected_by.append(reason)
        raise QueueFullError(f"the server is busy: {why}; send the request again later", reason=reason)

    async def _process(
        self, prompt: Prompt | EngineCoreRequest, params: SamplingParams, request_id: str, priority: int
    ) -> tuple[EngineCoreRequest, str | None]:
        """Check the request; text is tokenized on a thread, so that a long one does not hold up the others."""
        if isinstance(prompt, EngineCoreRequest):
            if prompt.grammar is not None:
                return await self._off_loop(self._checking, self.processor.check_resend, prompt, params), None
            return self.processor.check_resend(prompt, params), None
        call = (request_id, prompt, params, priority)
        if not self.processor.checks_at_once(params):
            return await self._off_loop(self._checking, self.processor.process_inputs, *call)
        if isinstance(prompt, list) or (isinstance(prompt, dict) and "prompt_token_ids" in prompt):
            return self.processor.process_inputs(*call)
        return await self._off_loop(self._tokenizing, self.processor.process_inputs, *call)

    @staticmethod
    async def _off_loop(pool: ThreadPoolExecutor, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, call, *args)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests by the ids given to `generate`; their generators get a last output that says "abort"."""
        self._abort([request_id] if isinstance(request_id, str) else request_id)

    async def abort_matching(self, request_ids: Sequence[str]) -> int:
        """End requests by the ids that clients see, which may stand for several of ours; without ids, all. How many."""
        open_ids = self.output_processor.external_ids()
        prefixes = tuple(f"{request_id}-" for request_id in request_ids)
        chosen = [i for i in open_ids if not request_ids or i in request_ids or i.startswith(prefixes)]
        self._abort(chosen)
        return len(chosen)

    def _abort(self, request_ids: Iterable[str]) -> None:
        self.engine_core.abort_requests(self.output_processor.abort_requests(request_ids))

    # -- outputs

    def _start_reading(self) -> None:
        """Handle outputs on the running loop, from the first time there is one."""
        if not self.engine_core.attach():
            return
        self._loop = asyncio.get_running_loop()
        self._dead = asyncio.Event()
        self._output_handler = self._loop.create_task(self._handle_outputs(), name="output-handler")
        self._idle_watch = self._loop.create_task(self._prepare_when_idle(), name="idle-watch")

    async def _prepare_when_idle(self) -> None:
        """Once nobody has wanted anything for a while, do what would disturb streams later."""
        num_quiet = 0
        while num_quiet < _QUIET_LOOKS:
            await asyncio.sleep(_QUIET_LOOK_S)
            is_busy = self._num_processing or self.output_processor.has_unfinished_requests()
            num_quiet = 0 if is_busy else num_quiet + 1
        try:
            await self._off_loop(self._checking, self.processor.prepare)
        except Exception as error:  # the first request that needs it tries again
            logger.warning("the process that checks constraints could not be started: %s", error)

    async def _handle_outputs(self) -> None:
        """Feed every output to its request until the core is gone; then every request hears of it."""
        try:
            while True:
                await self._handle(await self.engine_core.get_output())
        except EngineDeadError as error:
            self._on_dead(error)
        except Exception as error:  # a fault of ours; nobody may wait for outputs that no one handles
            logger.exception("the output handler failed")
            self._on_dead(EngineDeadError(f"the output handler failed: {type(error).__name__}: {error}"))
        finally:
            self._handled_all.set()

    async def _handle(self, message: EngineCoreOutputs) -> None:
        stats = IterationStats(rejected_by=self._rejected_by) if self._stat_loggers else None
        self._rejected_by = []
        for start in range(0, len(message.outputs), _CHUNK):
            if start:
                await asyncio.sleep(0)
            chunk = message.outputs[start : start + _CHUNK]
            done = self.output_processor.process_outputs(chunk, message.timestamp, stats)
            self.engine_core.abort_requests(done.requests_to_abort)
        for stat_logger in self._stat_loggers:
            stat_logger.record(message.scheduler_stats, stats)

    def _on_dead(self, error: EngineDeadError) -> None:
        if self.engine_core.dead_error is None:
            self.engine_core.dead_error = error
        if not self._is_shut_down:
            logger.error("%s", error)
        self.output_processor.fail_all(error)
        self._dead.set()

    def fail(self, cause: str) -> None:
        """Count as dead from now on, for a reason outside the core: every open request hears of it. On the loop."""
        self._on_dead(EngineDeadError(cause))

    # -- health

    @property
    def dead_error(self) -> BaseException:
        return self.engine_core.dead_error or EngineDeadError()

    @property
    def errored(self) -> bool:
        """Whether the engine is gone: it died, or was shut down."""
        return self.engine_core.dead_error is not None

    @property
    def is_running(self) -> bool:
        return not self.errored

    def _raise_if_dead(self) -> None:
        if self.errored:
            raise self.dead_error

    async def check_health(self) -> None:
        """Raises:
        EngineDeadError: the engine is gone.
        """
        self._start_reading()
        self._raise_if_dead()

    async def wait_dead(self) -> BaseException:
        """Return, with the reason, once the engine is gone. For a server that should then exit."""
        self._start_reading()
        if not self.errored:
            await self._dead.wait()
        return self.dead_error

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget every cached KV block; False while a running request holds one.

        reset_running_requests: take theirs too; they compute again what they had, and their answers are the same.
        """
        self._start_reading()
        return await self.engine_core.call_utility("reset_prefix_cache", reset_running_requests)

    async def collective_rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every worker. Answers that cannot be sent come as their text."""
        self._start_reading()
        return await self.engine_core.call_utility("collective_rpc", method, args)

    # -- sleeping

    async def sleep(self, level: int = 1, mode: PauseMode = "abort") -> None:
        """Give memory back: at level 1 the KV cache's, at level 2 the weights' too, which `wake_up` reads again.

        Open requests are aborted, waited for (if they have begun), or kept: they wait like requests that come, and go
        on when the engine is awake.

        Raises:
            RequestError: the level is not 1 or 2, or the engine was started without enable_sleep_mode.
            ConflictError: requests are waited for that stand still, or would stand still that others wait for.
            EngineDeadError: the engine is gone.
        """
        check_sleep(self.config, level)
        self._start_reading()
        if mode != "wait":
            await self.engine_core.call_utility("sleep", level, mode == "abort")
            return
        holder = uuid.uuid4().hex
        try:
            await self.engine_core.call_utility("hold_for_sleep", holder)
            await self._come_to_rest()
            await self.engine_core.call_utility("sleep", level, False)
        finally:
            # It sleeps, and requests wait for that; or whoever asked has given up.
            await self.engine_core.call_utility("end_hold", holder)

    async def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        """Have memory again: "weights", "kv_cache", or all of it. Whether requests go on, as they do when all is back.

        Raises:
            RequestError: a tag is neither. EngineError: the weights cannot be read; may be called again.
        """
        parts = check_tags(tags)
        self._start_reading()
        return await self.engine_core.call_utility("wake_up", parts)

    async def is_sleeping(self) -> bool:
        self._start_reading()
        return await self.engine_core.call_utility("is_sleeping")

    # -- profiling

    async def start_profile(self, prefix: str = "", delay: int | None = None, most: int | None = None) -> bool:
        """Record the workers' steps, `delay` from now and `most` of them (None: as --profiler-config says), into its
        directory. False if they are being recorded."""
        self._start_reading()
        return await self.engine_core.call_utility("start_profile", prefix, delay, most)

    async def stop_profile(self) -> list[str]:
        """End the recording; the files it is in."""
        self._start_reading()
        return await self.engine_core.call_utility("stop_profile")

    async def snapshots(self) -> list[EngineSnapshot]:
        """How each engine core stands now. Any API server may ask."""
        self._start_reading()
        answer = await self.engine_core.call_utility("snapshot")
        return [msgspec.convert(answer, EngineSnapshot)]

    # -- pausing

    async def pause_generation(self, mode: PauseMode = "abort", clear_cache: bool = True) -> None:
        """Begin with no request until `resume_generation`; those that come wait. Returns when nothing runs any more.

        Open requests are aborted; or waited for, if they have begun; or kept as they are, to go on with their next
        token after the pause. clear_cache: forget cached blocks, those of requests that are kept too: they compute
        again what they had, with the weights there are by then.

        Raises:
            ConflictError: requests are waited for that sleep, or would be kept that a sleep waits for.
            EngineDeadError: the engine is gone.
        """
        self._start_reading()
        await self.engine_core.call_utility("pause", mode)
        await self._come_to_rest()
        if clear_cache and await self.is_paused():  # not resumed meanwhile
            await self.reset_prefix_cache(reset_running_requests=True)

    async def _come_to_rest(self) -> None:
        while await self.engine_core.call_utility("is_coming_to_rest"):
            await asyncio.sleep(_LOOK_EVERY_S)

    async def resume_generation(self) -> None:
        self._start_reading()
        await self.engine_core.call_utility("resume")

    async def is_paused(self) -> bool:
        self._start_reading()
        return await self.engine_core.call_utility("is_paused")

    # -- end

    def shutdown(self, timeout_s: float = 0) -> None:
        """End the engine; idempotent, from any thread.

        Open requests get `timeout_s` seconds to finish (call it from another thread than the loop's for that);
        the rest end with finish_reason "abort".
        """
        if self._is_shut_down:
            return
        self._is_shut_down = True
        if timeout_s <= 0:
            self.engine_core.run_on_loop(self._abort_all)
        self.engine_core.shutdown(timeout_s)
        if timeout_s > 0 and self._output_handler is not None and self._loop.is_running():
            self._handled_all.wait(_LAST_OUTPUTS_S)  # requests that finished in time are told so
        self.engine_core.run_on_loop(self._end)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._checking.shutdown(wait=False, cancel_futures=True)
        self.processor.shutdown()

    def _abort_all(self) -> None:
        self.output_processor.abort_requests(self.output_processor.request_ids())

    def _end(self) -> None:
        self._abort_all()
        self._dead.set()
        if self._output_handler is not None and not self._loop.is_closed():
            self._output_handler.cancel()
            self._idle_watch.cancel()
