"""Runs one step: follows the scheduler's plan, runs the model, samples.

A step's inputs are made in host memory, which so far is the device's own: the CPU.
Owns the state of requests between steps and the KV cache's tensors. Does not know how a plan came about, nor
how its result is sent.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minivllm.attention.backend import AttentionBackend, ForwardContext
from minivllm.messages.worker import (
    CachedRequestData,
    GrammarOutput,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
)
from minivllm.models.decoder import DecoderForCausalLM
from minivllm.sample.sampler import DrawBuffers, Drawn, DrawInputs, Sampler, SamplerOutput
from minivllm.sample.step import GrammarMask, SampleBatch
from minivllm.worker.graphs import StepGraphs, key_of
from minivllm.worker.input_batch import InputBatch, InputBuffers
from minivllm.worker.prompt_logprobs import PromptLogprobs
from minivllm.worker.request_state import RequestTable


@dataclass(frozen=True)
class _Decode:
    """A step of one token a request, all of which are sampled. It serves for as long as its batch stays the same object."""

    batch: InputBatch
    ctx: ForwardContext
    draw: DrawInputs | None  # None: sampling is more than that, and not part of the step
    key: Hashable | None  # see worker/graphs.py


@dataclass(frozen=True)
class _Decoded:
    """What came of it. A replay gives the same tensors as the one before, so this serves for as long."""

    outputs: tuple[torch.Tensor, ...]
    drawn: Drawn | None  # good if no grammar comes

    @property
    def logits(self) -> torch.Tensor:
        return self.outputs[0]


class ModelRunner:
    def __init__(
        self,
        model: DecoderForCausalLM,
        backend: AttentionBackend,
        kv_caches: list[torch.Tensor],
        sampler: Sampler,
        *,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        group_of_layer: list[int],
        enforce_eager: bool = False,
    ) -> None:
        """group_of_layer: each layer's KV cache group; layers of different groups may share a tensor of kv_caches."""
        block_size = backend.spec.block_size
        self.model, self.backend, self.kv_caches, self.sampler = model, backend, kv_caches, sampler
        # As many again for requests that are preempted.
        num_groups = max(group_of_layer) + 1
        self.table = RequestTable(2 * max_num_seqs, max_model_len, block_size, num_groups=num_groups)
        self.buffers = InputBuffers(
            max_num_batched_tokens, max_num_seqs, -(-max_model_len // block_size), num_groups=num_groups
        )
        self._draw_buffers = DrawBuffers(max_num_seqs)
        self._group_of_layer = group_of_layer
        self.prompt_logprobs = PromptLogprobs(model.compute_logits, sampler)
        self._graphs = None if enforce_eager else StepGraphs()
        self._batch: InputBatch | None = None
        self._hidden: torch.Tensor | None = None
        self._decode: _Decode | None = None  # the last one
        self._decoded: _Decoded | None = None

    def execute_model(self, plan: SchedulerOutput) -> None:
        """Take in the plan and run the model on its tokens; `sample_tokens` follows."""
        self._follow(plan)
        self._batch = self._hidden = None
        if not plan.num_scheduled_tokens:
            return
        self._batch = batch = self.buffers.prepare(plan.num_scheduled_tokens, self.table)
        if self._graphs is not None and batch.is_decode:
            self._run_decode(batch)
        else:
            self._run(batch)

    @torch.inference_mode()
    def _run(self, batch: InputBatch) -> None:
        self._hidden = self.model.forward(batch.input_ids, batch.positions, self._context(self._metadata(batch)))

    def _run_decode(self, batch: InputBatch) -> None:
        if self._decode is None or self._decode.batch is not batch:
            self._decode = self._describe(batch)
        outputs = self._graphs.run(self._decode.key, self._step)
        if self._decoded is None or self._decoded.outputs is not outputs:
            drawn = Drawn(outputs[1].numpy(), outputs[2].numpy()) if self._decode.draw is not None else None
            self._decoded = _Decoded(outputs, drawn)

    def _describe(self, batch: InputBatch) -> _Decode:
        metadata = self._metadata(batch)
        only_draws = self.sampler.only_draws(batch.rows)
        draw = self.sampler.draw_inputs(batch.rows, batch.ends, self._draw_buffers) if only_draws else None
        key = key_of(batch.input_ids, batch.positions, metadata, draw)
        return _Decode(batch, self._context(metadata), draw, key)

    @torch.inference_mode()
    def _step(self) -> tuple[torch.Tensor, ...]:
        """What a decode step computes: logits and, if they can be, tokens and which rows are broken."""
        batch, draw = self._decode.batch, self._decode.draw
        logits = self.model.compute_logits(self.model.forward(batch.input_ids, batch.positions, self._decode.ctx))
        if draw is None:
            return (logits,)
        return logits, *self.sampler.draw(logits, draw)

    def _metadata(self, batch: InputBatch) -> list[Any]:
        """One a KV cache group."""
        return [self.backend.build_metadata(step) for step in batch.steps]

    def _context(self, metadata: list[Any]) -> ForwardContext:
        return ForwardContext([metadata[group] for group in self._group_of_layer], self.kv_caches)

    def sample_tokens(self, grammar: GrammarOutput | None = None) -> ModelRunnerOutput:
        """One token for each request whose last known token was in the step, and the logprobs asked for."""
        batch, hidden = self._batch, self._hidden
        self._batch = self._hidden = None
        if batch is None:
            return ModelRunnerOutput()
        if hidden is not None:
            return self._sample(batch, hidden, None, grammar)
        if self._decoded.drawn is not None and grammar is None:
            return self._accept_drawn(batch, self._decoded.logits, self._decoded.drawn)
        return self._sample(batch, None, self._decoded.logits, grammar)

    # Plan --------------------------------------------------------------------

    def _follow(self, plan: SchedulerOutput) -> None:
        for request_id in plan.finished_req_ids:
            self._forget(request_id)
        # Nothing to do for the preempted: their tokens stay, and their blocks are replaced when they resume.
        for request in plan.scheduled_new_reqs:
            self._remember(request)
        if plan.scheduled_cached_reqs.request_ids:
            self._continue(plan.scheduled_cached_reqs)

    def _forget(self, request_id: str) -> None:
        row = self.table.remove(request_id)
        if row is not None:
            self.sampler.remove_request(row)
            self.prompt_logprobs.remove_request(row)

    def _remember(self, request: NewRequestData) -> None:
        self._forget(request.request_id)
        row = self.table.add(request)
        params = request.sampling_params
        self.sampler.add_request(row, params, request.seed, request.eos_token_ids)
        self.prompt_logprobs.add_request(row, params)

    def _continue(self, known: CachedRequestData) -> None:
        rows = self.table.rows(known.request_ids)
        self.table.num_computed_tokens[rows] = known.num_computed_tokens
        if not any(known.new_block_ids) and not any(known.resumed):
            return
        for row, block_ids, resumed in zip(rows.tolist(), known.new_block_ids, known.resumed):
            if resumed:
                self.table.replace_blocks(row, block_ids)
            elif block_ids:
                self.table.append_blocks(row, block_ids)

    # Results -----------------------------------------------------------------

    @torch.inference_mode()
    def _sample(
        self,
        batch: InputBatch,
        hidden: torch.Tensor | None,
        logits: torch.Tensor | None,
        grammar: GrammarOutput | None,
    ) -> ModelRunnerOutput:
        """From the logits, or from hidden states that give them."""
        result = ModelRunnerOutput(batch.request_ids, [[] for _ in batch.request_ids])
        if logits is None:
            self.prompt_logprobs.add_to(result, batch, hidden, self.table)
            if not len(batch.samples):
                return result
            logits = self.model.compute_logits(hidden[batch.sampled_rows])
        rows = batch.rows[batch.samples]
        sampled = self.sampler(
            logits,
            SampleBatch(
                rows=rows,
                num_tokens=self.table.num_tokens[rows],
                num_prompt_tokens=self.table.num_prompt_tokens[rows],
                token_ids=self.table.token_ids,
            ),
            self._mask_of(grammar, rows),
        )
        return self._accept(batch, rows, sampled, result)

    def _accept(
        self, batch: InputBatch, rows: np.ndarray, sampled: SamplerOutput, result: ModelRunnerOutput
    ) -> ModelRunnerOutput:
        """Remember the tokens, and report them. rows: of the table, those that got one."""
        is_whole = len(rows) == len(batch.request_ids)
        ids = batch.request_ids if is_whole else [batch.request_ids[i] for i in batch.samples.tolist()]
        tokens = sampled.token_ids.reshape(-1, 1).tolist()
        if sampled.failed:
            self._append_sound(rows, sampled)
            for column in sampled.failed:
                tokens[column] = []
            result.failed.update({ids[column]: why for column, why in sampled.failed.items()})
            result.fields_at_fault.update({ids[column]: name for column, name in sampled.fields_at_fault.items()})
        else:
            self.table.append_tokens(rows, sampled.token_ids)
        if is_whole:
            result.sampled_token_ids = tokens
        else:
            for i, own in zip(batch.samples.tolist(), tokens):
                result.sampled_token_ids[i] = own
        if sampled.logprobs:
            result.logprobs.update(
                {ids[c]: lists for c, lists in sampled.logprobs.items() if c not in sampled.failed}
            )
        return result

    def _accept_drawn(self, batch: InputBatch, logits: torch.Tensor, drawn: Drawn) -> ModelRunnerOutput:
        """As `_accept`, for all requests of a decode step."""
        asks = self.sampler.asks_for_logprobs
        if not asks and self.buffers.books.append_drawn(drawn.token_ids, drawn.broken):
            return ModelRunnerOutput(batch.request_ids, [[token] for token in drawn.token_ids.tolist()])
        sampled = self.sampler.accept(drawn, logits, batch.rows)
        return self._accept(batch, batch.rows, sampled, ModelRunnerOutput(batch.request_ids))

    def _mask_of(self, grammar: GrammarOutput | None, rows: np.ndarray) -> GrammarMask | None:
        """The masks of the requests in these rows of the table.

        A request that was preempted while a plan in flight sampled for it is planned as if that token was not there; it
        is by now, so this step samples none and its mask is not needed.
        """
        if grammar is None:
            return None
        column_of = {row: column for column, row in enumerate(rows.tolist())}
        columns = [column_of.get(row, -1) for row in self.table.rows(grammar.request_ids).tolist()]
        bitmask = np.frombuffer(grammar.bitmask, np.uint32).reshape(len(columns), -1)
        if -1 in columns:
            bitmask = bitmask[np.array(columns) >= 0]
        return GrammarMask(np.array([column for column in columns if column >= 0], np.int64), bitmask)

    def _append_sound(self, rows: np.ndarray, sampled: SamplerOutput) -> None:
        going_on = np.ones(len(rows), bool)
        going_on[list(sampled.failed)] = False
        self.table.append_tokens(rows[going_on], sampled.token_ids[going_on])
