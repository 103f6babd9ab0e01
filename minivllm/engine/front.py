"""What the two front ends, AsyncLLM and LLMEngine, do alike: load the tokenizer, and send a request.

Holds no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from minivllm.config.engine import EngineConfig
from minivllm.engine.output_processor import OutputProcessor, RequestOutputCollector
from minivllm.engine.parallel_sampling import ParentRequest
from minivllm.exceptions import RequestError
from minivllm.messages.engine import SLEEPING_PARTS, EngineCoreRequest
from minivllm.messages.stats import IterationStats, SchedulerStats
from minivllm.outputs import SampleLogprobs
from minivllm.tokenizer.tokenizer import Tokenizer
from minivllm.utils.process import give_back_memory


class StatLogger(Protocol):
    """Whatever counts what the engine does."""

    def record(self, scheduler_stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """Add one message of the engine core."""

    def log(self, now: float) -> None:
        """Say what came since the last call, if there is a place to say it. Called by whoever owns the clock."""


class _Core(Protocol):
    """What sending needs of a client of the core."""

    def add_request(self, request: EngineCoreRequest) -> None: ...
    def abort_requests(self, request_ids: list[str]) -> None: ...


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer of an engine, or None with --skip-tokenizer-init.

    Raises:
        ModelFilesError: there is none that loads.
    """
    model = config.model
    if model.skip_tokenizer_init:
        return None
    tokenizer = Tokenizer.from_pretrained(
        model.tokenizer or model.model,
        mode=model.tokenizer_mode,
        revision=model.tokenizer_revision,
        trust_remote_code=model.trust_remote_code,
    )
    give_back_memory()  # reading a vocabulary of 150,000 entries leaves 100 MB of it
    return tokenizer


def check_sleep(config: EngineConfig, level: int) -> None:
    """Raises RequestError unless the engine can sleep at this level."""
    if not config.model.enable_sleep_mode:
        raise RequestError("this engine does not sleep; start it with --enable-sleep-mode")
    if level not in (1, 2):
        raise RequestError(f"level={level} must be 1 (the KV cache) or 2 (the weights too)", param="level")


def check_tags(tags: Sequence[str] | None) -> list[str]:
    """What is to wake up.

    Raises:
        RequestError: a tag names nothing that sleeps.
    """
    for tag in tags or ():
        if tag not in SLEEPING_PARTS:
            raise RequestError(f"tags: {tag[:60]!r} is not one of {', '.join(SLEEPING_PARTS)}", param="tags")
    return list(tags or SLEEPING_PARTS)


def submit(
    request: EngineCoreRequest,
    core: _Core,
    output_processor: OutputProcessor,
    *,
    external_id: str,
    prompt: str | None,
    collector: RequestOutputCollector | None = None,
    prior_logprobs: SampleLogprobs | None = None,
) -> list[str]:
    """Expect a request's outputs, then send it, or its n children; the internal ids.

    Expected first: an output can never meet a request that nobody expects. If it cannot be sent, nothing is
    expected any more.

    Raises:
        RequestError: a request of this internal id is open (only a resend's can be).
    """
    parent = ParentRequest(request) if request.sampling_params.n > 1 else None
    requests = [request] if parent is None else parent.child_requests()
    ids = [child.request_id for child in requests]
    output_processor.check_unused(ids)
    try:
        for index, child in enumerate(requests):
            output_processor.add_request(
                child,
                external_id=external_id,
                prompt=prompt,
                parent=parent,
                index=index,
                collector=collector,
                prior_logprobs=prior_logprobs,
            )
        for child in requests:
            core.add_request(child)
    except BaseException:
        core.abort_requests(output_processor.abort_requests(ids))
        raise
    return ids
