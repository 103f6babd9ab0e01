"""The engine for plain code: add requests, then step until none is left. `LLM` is built on it.

Owns the same pieces as AsyncLLM, without an event loop. The core lives in its own process, or in this one
when asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from minivllm.config.engine import EngineConfig
from minivllm.config.profiler import read_profiler_config
from minivllm.engine.core_client import InprocClient, SyncMPClient
from minivllm.engine.front import StatLogger, check_sleep, check_tags, load_tokenizer, submit
from minivllm.engine.output_processor import OutputProcessor
from minivllm.engine.processor import Processor, Prompt, default_sampling_params
from minivllm.exceptions import RequestError
from minivllm.logits_processors import load_logits_processors
from minivllm.messages.engine import EngineCoreRequest
from minivllm.messages.stats import IterationStats
from minivllm.outputs import RequestOutput, SampleLogprobs
from minivllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minivllm.engine.arg_utils import EngineArgs


class LLMEngine:
    """A running engine that moves when `step` is called. To be used from one thread."""

    def __init__(
        self, config: EngineConfig, *, in_process: bool, stat_loggers: Iterable[StatLogger] = ()
    ) -> None:
        """Start the core and wait until it serves.

        Raises:
            ConfigError, EngineStartError: it cannot; nothing is left behind.
        """
        self.config = config
        self.engine_core = InprocClient(config) if in_process else SyncMPClient(config)
        try:
            self.tokenizer = load_tokenizer(config)
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

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        """Check the arguments, start the core (where they say), wait until it serves."""
        config = engine_args.create_engine_config("offline")
        return cls(config, in_process=config.parallel.disable_frontend_multiprocessing)

    @classmethod
    def from_engine_config(cls, config: EngineConfig, *, in_process: bool = False) -> LLMEngine:
        """Start the core in its own process, or in this one."""
        return cls(config, in_process=in_process)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt | EngineCoreRequest,
        params: SamplingParams,
        priority: int = 0,
        *,
        prior_logprobs: SampleLogprobs | None = None,
    ) -> str:
        """Queue a request; its outputs come from `step` under `request_id`, which is returned.

        An EngineCoreRequest is a resend: it goes on where its prior output ends, whose rows of logprobs, if
        any were asked for, are handed over in `prior_logprobs`.

        Raises:
            RequestError: the request is at fault; the engine has not seen it.
            EngineDeadError: the engine is gone.
        """
        if isinstance(prompt, EngineCoreRequest):
            request, text = self.processor.check_resend(prompt, params), None
        else:
            request, text = self.processor.process_inputs(request_id, prompt, params, priority)
        submit(
            request,
            self.engine_core,
            self.output_processor,
            external_id=request_id,
            prompt=text,
            prior_logprobs=prior_logprobs,
        )
        return request_id

    def step(self) -> list[RequestOutput]:
        """Wait for the core's next outputs and return what they mean; [] when no request is open.

        A request that failed in the engine comes back finished, with finish_reason "error" and `error` set.

        Raises:
            EngineDeadError: the engine is gone.
        """
        if not self.has_unfinished_requests():
            return []
        message = self.engine_core.get_output()
        stats = IterationStats()
        done = self.output_processor.process_outputs(message.outputs, message.timestamp, stats)
        self.engine_core.abort_requests(done.requests_to_abort)
        for stat_logger in self._stat_loggers:
            stat_logger.record(message.scheduler_stats, stats)
        return done.request_outputs

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests; no further output of theirs comes."""
        ids = [request_ids] if isinstance(request_ids, str) else request_ids
        self.engine_core.abort_requests(self.output_processor.abort_requests(ids))

    def has_unfinished_requests(self) -> bool:
        return self.output_processor.has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        return self.output_processor.num_unfinished_requests

    def reset_prefix_cache(self) -> bool:
        """Forget every cached KV block. To be called when no request is open."""
        return self.engine_core.call_utility("reset_prefix_cache")

    def sleep(self, level: int = 1) -> None:
        """Give memory back; see AsyncLLM.sleep. Open requests are kept.

        Raises:
            RequestError: the level is not 1 or 2, or the engine was made without enable_sleep_mode.
        """
        check_sleep(self.config, level)
        self.engine_core.call_utility("sleep", level, False)

    def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        """Have memory again; whether all is back.

        Raises:
            RequestError: a tag is wrong. EngineError: the weights cannot be read; may be called again.
        """
        return self.engine_core.call_utility("wake_up", check_tags(tags))

    def is_sleeping(self) -> bool:
        return self.engine_core.call_utility("is_sleeping")

    def start_profile(self, prefix: str = "") -> bool:
        """Record steps into the directory of profiler_config; False if they are being recorded.

        Raises:
            RequestError: there is none.
        """
        if not read_profiler_config(self.config.observability.profiler_config).is_on:
            raise RequestError("profiler_config names no torch_profiler_dir to write to")
        return self.engine_core.call_utility("start_profile", prefix, None, None)

    def stop_profile(self) -> list[str]:
        """End the recording; the files it is in."""
        return self.engine_core.call_utility("stop_profile")

    def shutdown(self, timeout_s: float = 0) -> None:
        """End the engine; idempotent."""
        self.engine_core.shutdown(timeout_s)
        self.processor.shutdown()
