"""Beam search, above the engine: each step asks for one token after every beam, with the logprobs of the likeliest.

Owns the beams of one prompt. The engine sees ordinary requests; what beams share comes from its prefix cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minivllm.engine.processor import Processor
from minivllm.exceptions import EngineGenerateError, RequestError
from minivllm.outputs import CompletionOutput, Logprob, RequestOutput, SampleLogprobs
from minivllm.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from minivllm.engine.async_llm import AsyncLLM
    from minivllm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Beam:
    """One way to go on after the prompt. An end token that ended it is the last of `token_ids`."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: SampleLogprobs = field(default_factory=list)
    cum_logprob: float = 0.0
    stopped: bool = False


class BeamSearch:
    """The search after one prompt: `prompts` to run, `advance` with what came, until `finished`; then `best`.

    As in vLLM: every beam offers its 2·width likeliest tokens; an end token completes it, the best `width` of the rest
    go on; in the end the best `width` of the completed and the open ones are the answer.
    """

    def __init__(self, prompt_token_ids: list[int], params: BeamSearchParams, processor: Processor) -> None:
        """Raises RequestError: the prompt does not fit, or the width needs more logprobs than the engine gives."""
        num_logprobs = 2 * params.beam_width
        if num_logprobs > processor.max_logprobs:
            raise RequestError(
                f"a beam width of {params.beam_width} needs {num_logprobs} logprobs, more than --max-logprobs "
                f"{processor.max_logprobs}; ask for less, or raise it",
                param="beam_width",
            )
        self.params = params
        self.prompt_token_ids = prompt_token_ids
        self.step_params = SamplingParams(
            max_tokens=1, logprobs=num_logprobs, temperature=params.temperature, ignore_eos=True
        )
        processor.process_inputs("check", {"prompt_token_ids": prompt_token_ids}, self.step_params)
        ends = [] if params.ignore_eos else [*processor.eos_token_ids, *processor.extra_stop_token_ids]
        self._ends = frozenset(ends)
        self._beams = [Beam()]
        self._completed: list[Beam] = []
        self._num_left = min(params.max_tokens, processor.max_model_len - len(prompt_token_ids))

    @property
    def finished(self) -> bool:
        return self._num_left <= 0 or not self._beams

    def prompts(self) -> list[list[int]]:
        """What to run next, one prompt for each open beam."""
        return [self.prompt_token_ids + beam.token_ids for beam in self._beams]

    def advance(self, outputs: Sequence[RequestOutput]) -> None:
        """Take the outputs of `prompts`, in order.

        Raises:
            EngineGenerateError: one failed.
        """
        offers: list[Beam] = []
        for beam, output in zip(self._beams, outputs):
            row = _row(output)
            for token, logprob in row.items():
                offer = Beam(
                    [*beam.token_ids, token],
                    [*beam.logprobs, row],
                    beam.cum_logprob + logprob.logprob,
                    stopped=token in self._ends,
                )
                (self._completed if offer.stopped else offers).append(offer)
        self._beams = self._best_of(offers)
        self._num_left -= 1

    def best(self) -> list[Beam]:
        """The answers, best first."""
        return self._best_of(self._completed + self._beams)

    def _best_of(self, beams: list[Beam]) -> list[Beam]:
        return sorted(beams, key=self.score, reverse=True)[: self.params.beam_width]

    def score(self, beam: Beam) -> float:
        """Summed logprobs over (prompt and output tokens, without an end token) ** length_penalty."""
        num_tokens = len(self.prompt_token_ids) + len(beam.token_ids) - beam.stopped
        return beam.cum_logprob / num_tokens**self.params.length_penalty


def _row(output: RequestOutput) -> dict[int, Logprob]:
    """The logprobs of an output's only token."""
    answer = output.outputs[0]
    if output.error is not None or not answer.logprobs:
        raise EngineGenerateError(output.error or "the engine ended a beam without its logprobs")
    return answer.logprobs[0]


async def beam_search(
    engine: AsyncLLM,
    prompt_token_ids: list[int],
    params: BeamSearchParams,
    request_id: str,
    *,
    cache_salt: str | None = None,
    num_logprobs: int | None = None,
) -> RequestOutput:
    """The finished output of one prompt, its `beam_width` answers best first.

    num_logprobs: of the likeliest, beside each token's own; None: no logprobs.

    Raises:
        As `AsyncLLM.generate`. Cancelling it aborts what runs.
    """
    search = BeamSearch(prompt_token_ids, params, engine.processor)
    step = 0
    while not search.finished:
        prompts = [{"prompt_token_ids": ids} | _salt(cache_salt) for ids in search.prompts()]
        tasks = [
            asyncio.ensure_future(_last(engine, prompt, search.step_params, f"{request_id}-{step}-{i}"))
            for i, prompt in enumerate(prompts)
        ]
        try:
            search.advance(await asyncio.gather(*tasks))
        except BaseException:  # nothing of a search that has ended may run on
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        step += 1
    answers = [
        _answer(index, beam, search, engine.tokenizer, num_logprobs) for index, beam in enumerate(search.best())
    ]
    return RequestOutput(request_id, None, prompt_token_ids, answers, finished=True)


def _salt(cache_salt: str | None) -> dict[str, str]:
    return {} if cache_salt is None else {"cache_salt": cache_salt}


async def _last(engine: AsyncLLM, prompt: dict, params: SamplingParams, request_id: str) -> RequestOutput:
    async for output in engine.generate(prompt, params, request_id):
        if output.finished:
            return output
    raise EngineGenerateError("the engine ended before its answer was finished")


def _answer(
    index: int, beam: Beam, search: BeamSearch, tokenizer: Tokenizer | None, num_logprobs: int | None
) -> CompletionOutput:
    params = search.params
    hides_end = beam.stopped and not params.include_stop_str_in_output
    token_ids = beam.token_ids[:-1] if hides_end else beam.token_ids
    # An end token that is to be seen is seen, special or not.
    hides_special = params.skip_special_tokens and not (beam.stopped and params.include_stop_str_in_output)
    text = "" if tokenizer is None else tokenizer.decode(token_ids, skip_special_tokens=hides_special)
    rows = None
    if num_logprobs is not None:
        rows = [_shown(row, token, num_logprobs) for row, token in zip(beam.logprobs, token_ids)]
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=token_ids,
        cumulative_logprob=beam.cum_logprob,
        logprobs=rows,
        finish_reason="stop" if beam.stopped else "length",
        stop_reason=beam.token_ids[-1] if beam.stopped else None,
    )


def _shown(row: dict[int, Logprob], token: int, num_logprobs: int) -> dict[int, Logprob]:
    """A token's own logprob first, then the likeliest."""
    likeliest = sorted(row, key=lambda candidate: -row[candidate].logprob)[:num_logprobs]
    return {candidate: row[candidate] for candidate in [token, *likeliest]}
