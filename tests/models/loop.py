"""A small engine in one process: the real scheduler drives the real worker, step by step, without sockets."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from minivllm.config.cache import CacheConfig
from minivllm.config.compilation import CompilationConfig
from minivllm.config.device import DeviceConfig
from minivllm.config.engine import EngineConfig
from minivllm.config.hf_config import HFConfig
from minivllm.config.load import LoadConfig
from minivllm.config.model import ModelConfig
from minivllm.config.scheduler import SchedulerConfig
from minivllm.core.sched.scheduler import Scheduler
from minivllm.messages.engine import EngineCoreOutput, EngineCoreRequest
from minivllm.messages.worker import SchedulerOutput
from minivllm.models.registry import ModelRegistry
from minivllm.platforms.platform import Platform
from minivllm.sampling_params import SamplingParams
from minivllm.worker.worker import Worker

BLOCK_SIZE = 32
MOST_STEPS = 2000


def engine_config(model: Path, **options: Any) -> EngineConfig:
    """An EngineConfig for a model directory; options are fields of any of its parts."""
    hf_config = HFConfig.from_dict(json.loads((model / "config.json").read_text()))
    parts = {
        "cache": (CacheConfig, {"block_size": BLOCK_SIZE}),
        "device": (DeviceConfig, {"device": "cpu"}),
        "compilation": (CompilationConfig, {}),
        "scheduler": (SchedulerConfig, {}),
        "load": (LoadConfig, {"use_tqdm_on_load": False}),
        "model": (ModelConfig, {"model": str(model), "max_model_len": "auto"}),
    }
    made = {}
    for name, (cls, values) in parts.items():
        chosen = {key: options.pop(key) for key in list(options) if key in cls.__dataclass_fields__}
        made[name] = cls(**values | chosen)
    assert not options, options
    return EngineConfig(hf_config=hf_config, model_class=ModelRegistry.target(hf_config.architecture), **made)


@dataclass
class Answer:
    """All that came back for one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)
    num_cached_tokens: int = field(default=0, compare=False)
    finish_reason: str | None = None
    error: str | None = None

    def take(self, output: EngineCoreOutput) -> None:
        assert self.finish_reason is None, "an output after the last one"
        self.tokens += output.new_token_ids
        for lists, rows in (
            (output.new_logprobs, self.logprobs),
            (output.new_prompt_logprobs, self.prompt_logprobs),
        ):
            if lists is not None:
                rows += [dict(zip(ids, values)) for ids, values in zip(lists.token_ids, lists.logprobs)]
        if output.new_logprobs is not None:
            self.ranks += output.new_logprobs.ranks
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if output.finish_reason is not None:
            self.finish_reason, self.error = str(output.finish_reason), output.error


class Loop:
    """`run` answers requests; what the prefix cache holds stays from one run to the next."""

    def __init__(
        self,
        model: Path,
        *,
        platform: Platform | None = None,
        plans_in_flight: int = 1,
        checks_integrity: bool = True,
        **options: Any,
    ) -> None:
        """checks_integrity: of the scheduler's books behind each step, which goes through all blocks."""
        self.config = engine_config(model, **{"num_gpu_blocks_override": 128, "max_num_seqs": 16} | options)
        self.worker = Worker(self.config, platform)
        self.ready = self.worker.initialize(lambda phase: None)
        self.scheduler = Scheduler(
            max_num_batched_tokens=self.ready.max_num_batched_tokens,
            max_num_seqs=self.ready.max_num_seqs,
            max_model_len=self.ready.max_model_len,
            num_blocks=self.ready.num_blocks,
            block_size=self.ready.block_size,
            kv_cache_groups=self.ready.kv_cache_groups,
            enable_prefix_caching=self.config.cache.enable_prefix_caching,
            enable_chunked_prefill=self.config.scheduler.enable_chunked_prefill,
            max_plans_in_flight=plans_in_flight,
        )
        self._plans_in_flight, self._checks_integrity = plans_in_flight, checks_integrity
        self._in_flight: deque[tuple[SchedulerOutput, Any]] = deque()
        self.num_preemptions = 0
        self._num_requests = 0

    def run(
        self,
        prompts: list[list[int]],
        params: SamplingParams | list[SamplingParams],
        *,
        prior: list[list[int]] | None = None,
        seeds: list[int] | None = None,
        eos_token_ids: list[int] | None = None,
        stagger: int = 0,
    ) -> list[Answer]:
        """Answer the prompts together; with `stagger`, each arrives so many steps after the one before."""
        answers: dict[str, Answer] = {}
        arriving: list[EngineCoreRequest] = []
        for i, prompt in enumerate(prompts):
            request_id = f"r{self._num_requests}"
            self._num_requests += 1
            answers[request_id] = Answer()
            arriving.append(
                EngineCoreRequest(
                    request_id=request_id,
                    prompt_token_ids=prompt,
                    sampling_params=params if isinstance(params, SamplingParams) else params[i],
                    seed=seeds[i] if seeds else i,
                    eos_token_ids=eos_token_ids or [],
                    prior_output_token_ids=prior[i] if prior else [],
                )
            )
        num_steps = 0
        while arriving or self.scheduler.has_requests() or self._in_flight:
            while arriving and (not stagger or num_steps >= stagger * (len(answers) - len(arriving))):
                self.scheduler.add_request(arriving.pop(0))
            self._step(answers)
            num_steps += 1
            assert num_steps < MOST_STEPS, "the requests do not end"
        return list(answers.values())

    def _step(self, answers: dict[str, Answer]) -> None:
        while self.scheduler.has_requests() and len(self._in_flight) < self._plans_in_flight:
            plan = self.scheduler.schedule()
            self.num_preemptions += len(plan.preempted_req_ids)
            self.worker.execute_model(plan)
            if self._plans_in_flight > 1:
                self._in_flight.append((plan, self.worker.start_sampling(None).result))
            else:
                self._in_flight.append((plan, partial(self.worker.sample_tokens, None)))
            if not plan.num_scheduled_tokens:
                break
        plan, result_of = self._in_flight.popleft()
        result = result_of()
        for outputs in self.scheduler.update_from_output(plan, result).values():
            for output in outputs:
                answers[output.request_id].take(output)
        if self._checks_integrity:
            self.scheduler.check_integrity()
