"""What the core sends, to what users read. The only loop over outputs in the front end.

Owns the front end's state of every unfinished request: text, logprobs, times, and the collector its
consumer waits on. Knows nothing of sockets; tells its caller which requests the core should abort.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from minivllm.engine.detokenizer import IncrementalDetokenizer
from minivllm.engine.logprobs import LogprobsProcessor
from minivllm.engine.parallel_sampling import ParentRequest
from minivllm.exceptions import EngineGenerateError, MinivllmError, RequestError
from minivllm.messages.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from minivllm.messages.stats import FinishedRequestStats, IterationStats
from minivllm.outputs import CompletionOutput, PromptLogprobs, RequestMetrics, RequestOutput, SampleLogprobs
from minivllm.sampling_params import RequestOutputKind
from minivllm.tokenizer.tokenizer import Tokenizer


class RequestOutputCollector:
    """One request's outputs on their way to one consumer: never more than one waits.

    A consumer slower than the engine gets DELTA outputs merged, of other kinds the newest. An error
    takes the place of whatever waits.
    """

    def __init__(self, output_kind: RequestOutputKind) -> None:
        self._merge = output_kind is RequestOutputKind.DELTA
        self._waiting: RequestOutput | Exception | None = None
        self._consumer: asyncio.Future[None] | None = None  # while it waits

    def put(self, output: RequestOutput | Exception) -> None:
        """Never blocks. To be called on the event loop's thread."""
        if self._merge and isinstance(self._waiting, RequestOutput) and isinstance(output, RequestOutput):
            self._waiting.add(output)
        elif not isinstance(self._waiting, Exception):
            self._waiting = output
        if self._consumer is not None and not self._consumer.done():
            self._consumer.set_result(None)

    async def get(self) -> RequestOutput:
        """The next output; raises the error that came instead."""
        while self._waiting is None:
            self._consumer = asyncio.get_running_loop().create_future()
            await self._consumer
        waiting, self._waiting = self._waiting, None
        if isinstance(waiting, Exception):
            raise waiting
        return waiting


@dataclass
class ProcessedOutputs:
    """What came of one batch: outputs for callers without a collector, and requests the core should stop."""

    request_outputs: list[RequestOutput] = field(default_factory=list)
    requests_to_abort: list[str] = field(default_factory=list)


class RequestState:
    """One request of the core, as the front end sees it. A child of n > 1 has a parent and its own index.

    A request with prior output goes on where that ends: its text, its deltas, its counts. The prior tokens'
    logprobs are known only if handed over (`prior_logprobs`); else rows and their sum begin behind them.
    """

    def __init__(
        self,
        request: EngineCoreRequest,
        *,
        external_id: str,
        prompt: str | None,
        tokenizer: Tokenizer | None,
        parent: ParentRequest | None,
        index: int,
        collector: RequestOutputCollector | None,
        stream_interval: int,
        prior_logprobs: SampleLogprobs | None,
    ) -> None:
        params = request.sampling_params
        self.request_id = request.request_id
        self.external_id = external_id
        self.prompt = prompt
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.prompt_token_ids = None if request.prompt_embeds is not None else request.prompt_token_ids
        self.params = params
        self._delta = params.output_kind is RequestOutputKind.DELTA
        self._only_final = params.output_kind is RequestOutputKind.FINAL_ONLY
        self.parent = parent
        self.index = index
        self.collector = collector
        self.detokenizer = IncrementalDetokenizer(tokenizer, self.prompt_token_ids or [], params)
        self.logprobs = LogprobsProcessor(tokenizer, params)
        self.stream_interval = max(stream_interval, params.stream_interval or 1)
        self.num_sent_tokens = 0
        self.num_unscored_tokens = 0  # leading ones whose logprobs nobody handed over
        self.sent_prompt_logprobs = False
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.scheduled_time: float | None = None
        self.last_token_time = 0.0
        self._stop_token_ids: frozenset[int] | None = None  # where one must look
        if request.grammar is not None:
            self._stop_token_ids = frozenset([*params.stop_token_ids, *request.eos_token_ids])
        if request.prior_output_token_ids:
            self._continue_from(request, prior_logprobs)

    def _continue_from(self, request: EngineCoreRequest, prior_logprobs: SampleLogprobs | None) -> None:
        """Stand where the front end stood that had been sent, and had sent on, the prior output."""
        self.detokenizer.continue_from(
            request.prior_output_token_ids, ended_by_stop_token=_is_ended_by_stop_token(request)
        )
        self.num_sent_tokens = len(self.detokenizer.token_ids)
        self.sent_prompt_logprobs = True
        if prior_logprobs is None:
            self.num_unscored_tokens = self.num_sent_tokens
        else:
            self.logprobs.continue_from(prior_logprobs[: self.num_sent_tokens])

    def is_stopped_by(self, output: EngineCoreOutput) -> bool:
        """Whether an output that ends with STOP ends with a stop token: a grammar ends with any token."""
        if self._stop_token_ids is None or not output.new_token_ids:
            return True
        return output.new_token_ids[-1] in self._stop_token_ids

    def make_output(
        self, finish_reason: FinishReason | None, stop_reason: int | str | None
    ) -> RequestOutput | None:
        """The output to show now, or None when it is not yet time for one."""
        finished = finish_reason is not None
        if not self._is_due(finished):
            return None
        answer = self._answer(finished)
        if finished:
            answer.finish_reason, answer.stop_reason = str(finish_reason), stop_reason
        answers = [answer] if self.parent is None else self.parent.add(answer)
        if not answers:
            return None
        prompt_logprobs, prompt_token_id_logprobs = self._prompt_logprobs()
        return RequestOutput(
            request_id=self.external_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            outputs=answers,
            finished=finished if self.parent is None else self.parent.finished,
            prompt_logprobs=prompt_logprobs,
            prompt_token_id_logprobs=prompt_token_id_logprobs,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
        )

    def _is_due(self, finished: bool) -> bool:
        if finished:
            return True
        if self._only_final:
            return False
        num_unsent = len(self.detokenizer.token_ids) - self.num_sent_tokens
        return num_unsent > 0 and (self.num_sent_tokens == 0 or num_unsent >= self.stream_interval)

    def _answer(self, finished: bool) -> CompletionOutput:
        detokenizer = self.detokenizer
        start = self.num_sent_tokens if self._delta else 0
        self.num_sent_tokens = len(detokenizer.token_ids)
        logprobs = self.logprobs.logprobs
        return CompletionOutput(
            index=self.index,
            text=detokenizer.next_text(finished=finished, delta=self._delta),
            token_ids=detokenizer.token_ids[start:],
            cumulative_logprob=self.logprobs.cumulative_logprob,
            logprobs=None if logprobs is None else logprobs[max(start - self.num_unscored_tokens, 0) :],
        )

    def _prompt_logprobs(self) -> tuple[PromptLogprobs | None, list[list[float]] | None]:
        """All rows, and those of tokens asked for by id; under DELTA only once."""
        if self.sent_prompt_logprobs and self._delta:
            return None, None
        self.sent_prompt_logprobs = True
        return self.logprobs.prompt_logprobs, self.logprobs.prompt_token_id_logprobs


class OutputProcessor:
    """Every unfinished request of this front end, by its internal id."""

    def __init__(self, tokenizer: Tokenizer | None, *, stream_interval: int = 1) -> None:
        self._tokenizer = tokenizer
        self._stream_interval = stream_interval
        self._states: dict[str, RequestState] = {}
        self._by_external_id: defaultdict[str, set[str]] = defaultdict(set)
        self._aborted: list[FinishedRequestStats] = []  # since the last batch of outputs

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._states)

    def num_prompt_tokens_without_answer(self) -> int:
        """Prompt tokens of open requests that have no token yet. Looks at every open request."""
        return sum(
            state.num_prompt_tokens
            for state in self._states.values()
            if state.metrics.first_token_time is None
        )

    def request_ids(self) -> list[str]:
        """The internal ids of all open requests."""
        return list(self._states)

    def external_ids(self) -> list[str]:
        """The ids given to `generate` of all open requests."""
        return list(self._by_external_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self._states)

    def check_unused(self, request_ids: Iterable[str]) -> None:
        """Raises:
        RequestError: one of these internal ids is that of an open request.
        """
        for request_id in request_ids:
            if request_id in self._states:
                raise RequestError(f"request id {request_id!r} is in use; choose another", param="request_id")

    def add_request(
        self,
        request: EngineCoreRequest,
        *,
        external_id: str,
        prompt: str | None,
        parent: ParentRequest | None = None,
        index: int = 0,
        collector: RequestOutputCollector | None = None,
        prior_logprobs: SampleLogprobs | None = None,
    ) -> None:
        """Expect outputs of this request. To be called before the core hears of it.

        prior_logprobs: of the request's prior output, one row a token, as they had been sent.
        """
        self._states[request.request_id] = RequestState(
            request,
            external_id=external_id,
            prompt=prompt,
            tokenizer=self._tokenizer,
            parent=parent,
            index=index,
            collector=collector,
            stream_interval=self._stream_interval,
            prior_logprobs=prior_logprobs,
        )
        self._by_external_id[external_id].add(request.request_id)

    def process_outputs(
        self, outputs: Iterable[EngineCoreOutput], now: float, stats: IterationStats | None = None
    ) -> ProcessedOutputs:
        """Turn one batch of the core's outputs into users' outputs.

        now: the core's monotonic clock, in seconds, when it sent them. An output of a request no longer known
        (aborted meanwhile) is dropped.
        """
        done = ProcessedOutputs()
        if stats is not None:
            stats.finished_requests += self._aborted
        self._aborted.clear()
        # The only Python loop over outputs on this path; add per-request work here.
        for output in outputs:
            state = self._states.get(output.request_id)
            if state is None:
                continue
            finish_reason, stop_reason = self._update(state, output)
            self._count(state, output, now, stats)
            if finish_reason is not None:
                if output.finish_reason is None:  # a stop string ended it; the core cannot know
                    done.requests_to_abort.append(state.request_id)
                self._finish(state, finish_reason, now, stats)
            self._deliver(state, finish_reason, stop_reason, output, done)
        return done

    @staticmethod
    def _update(
        state: RequestState, output: EngineCoreOutput
    ) -> tuple[FinishReason | None, int | str | None]:
        """Feed the state; why the request is now finished, if it is."""
        if output.scheduled_time is not None:
            state.scheduled_time = output.scheduled_time
            state.num_cached_tokens = output.num_cached_tokens
        if output.num_preemptions:
            state.num_preemptions = output.num_preemptions
        stop = state.detokenizer.update(
            output.new_token_ids,
            ended_by_stop_token=output.finish_reason is FinishReason.STOP and state.is_stopped_by(output),
            finished=output.finish_reason is not None,
        )
        has_logprobs = output.new_logprobs is not None or output.new_prompt_logprobs is not None
        if has_logprobs and not state.detokenizer.has_ended:
            state.logprobs.update(output)
        if stop is not None and output.finish_reason is not FinishReason.ERROR:
            return FinishReason.STOP, stop
        return output.finish_reason, output.stop_reason

    @staticmethod
    def _deliver(
        state: RequestState,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
        output: EngineCoreOutput,
        done: ProcessedOutputs,
    ) -> None:
        if finish_reason is FinishReason.ERROR and state.collector is not None:
            state.collector.put(_error_of(output))
            return
        error = output.error
        if state.parent is not None:
            error = state.parent.first_error(error)
        made = state.make_output(finish_reason, stop_reason)
        if made is None:
            return
        made.error = error
        if state.collector is not None:
            state.collector.put(made)
        else:
            done.request_outputs.append(made)

    def abort_requests(self, ids: Iterable[str]) -> list[str]:
        """End requests by external or internal id, with an output that says so; the internal ids that were open."""
        internal: list[str] = []
        for request_id in ids:
            known = self._by_external_id.get(request_id, ())
            internal.extend(sorted(known) or [request_id])
        aborted = []
        for request_id in internal:
            state = self._states.get(request_id)
            if state is not None:
                self._abort(state)
                aborted.append(request_id)
        return aborted

    def _abort(self, state: RequestState) -> None:
        state.detokenizer.update([], ended_by_stop_token=False, finished=True)
        self._forget(state)
        state.metrics.finished_time = time.monotonic()
        self._aborted.append(_finished_stats(state, FinishReason.ABORT, state.metrics.finished_time))
        made = state.make_output(FinishReason.ABORT, None)
        if made is not None and state.collector is not None:
            state.collector.put(made)

    def fail_all(self, error: Exception) -> None:
        """The engine is gone: every open request ends with this error."""
        states = list(self._states.values())
        self._states.clear()
        self._by_external_id.clear()
        for state in states:
            if state.collector is not None:
                state.collector.put(error)

    def _forget(self, state: RequestState) -> None:
        del self._states[state.request_id]
        siblings = self._by_external_id[state.external_id]
        siblings.discard(state.request_id)
        if not siblings:
            del self._by_external_id[state.external_id]

    @staticmethod
    def _count(
        state: RequestState, output: EngineCoreOutput, now: float, stats: IterationStats | None
    ) -> None:
        if not output.new_token_ids:
            return
        metrics = state.metrics
        is_first = metrics.first_token_time is None
        if is_first:
            metrics.first_token_time = now
        if stats is not None:
            stats.num_generation_tokens += len(output.new_token_ids)
            if is_first:
                stats.num_prompt_tokens += state.num_prompt_tokens
                stats.num_cached_tokens += state.num_cached_tokens
                stats.time_to_first_tokens_s.append(now - metrics.arrival_time)
            else:
                stats.inter_token_latencies_s.append(now - state.last_token_time)
        state.last_token_time = now

    def _finish(
        self, state: RequestState, finish_reason: FinishReason, now: float, stats: IterationStats | None
    ) -> None:
        self._forget(state)
        state.metrics.finished_time = time.monotonic()
        if stats is not None:
            stats.finished_requests.append(_finished_stats(state, finish_reason, now))


def _error_of(output: EngineCoreOutput) -> MinivllmError:
    """What ended a request: its own fault, which only running it has shown, or ours."""
    if output.error_param is not None:
        return RequestError(output.error, param=output.error_param)
    return EngineGenerateError(output.error or "the request failed in the engine")


def _is_ended_by_stop_token(request: EngineCoreRequest) -> bool:
    """Whether the prior output's last token ended it, by the core's rule (`Request.finish_if_stopped`)."""
    prior, params = request.prior_output_token_ids, request.sampling_params
    if len(prior) <= params.min_tokens:
        return False
    return prior[-1] in params.stop_token_ids or (
        not params.ignore_eos and prior[-1] in request.eos_token_ids
    )


def _finished_stats(state: RequestState, finish_reason: FinishReason, now: float) -> FinishedRequestStats:
    arrival = state.metrics.arrival_time
    scheduled = state.scheduled_time if state.scheduled_time is not None else now
    first = state.metrics.first_token_time if state.metrics.first_token_time is not None else now
    return FinishedRequestStats(
        finish_reason=str(finish_reason),
        num_prompt_tokens=state.num_prompt_tokens,
        num_generation_tokens=len(state.detokenizer.token_ids),
        num_cached_tokens=state.num_cached_tokens,
        max_tokens_param=state.params.max_tokens,
        n_param=state.parent.n if state.parent is not None else 1,
        e2e_latency_s=now - arrival,
        queue_s=max(scheduled - arrival, 0.0),
        prefill_s=max(first - scheduled, 0.0),
        decode_s=max(state.last_token_time - first, 0.0) if state.last_token_time else 0.0,
        num_preemptions=state.num_preemptions,
    )
