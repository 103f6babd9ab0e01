"""Runs one step: follows the scheduler's plan, runs the model, samples. One class for the CPU and for GPUs.

On a CPU a step's inputs are made where the model reads them, and its tokens are known when it ends; steps are replayed
from their native calls, recorded once for all numbers of tokens and requests (`graphs.py`). A GPU has memory and a pace
of its own: inputs are copied (`buffers.py`), decodes padded to the sizes of captured graphs (`graphs.py`), and tokens
stay there until they are asked for (`device_sampling.py`); nothing in a step waits for the device.
Owns the state of requests between steps and the KV cache's tensors. Does not know how a plan came about, nor
how its result is sent.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from minivllm.attention.backend import AttentionBackend, ForwardContext
from minivllm.config.compilation import CaptureOptions
from minivllm.layers.embedding import GivenEmbeddings
from minivllm.messages.worker import (
    CachedRequestData,
    GrammarOutput,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
)
from minivllm.models.decoder import DecoderForCausalLM
from minivllm.ops import native
from minivllm.ops.op import OpSpec
from minivllm.ops.recording import Outputs, Sizes
from minivllm.platforms.platform import Platform
from minivllm.sample.sampler import NONFINITE, DrawBuffers, DrawInputs, Drawn, Sampler, SamplerOutput
from minivllm.sample.step import GrammarMask, SampleBatch
from minivllm.worker.buffers import Staging
from minivllm.worker.capture_shapes import CaptureShapes
from minivllm.worker.device_sampling import DeviceDraw, DeviceSampling, Handle
from minivllm.worker.graphs import CapturedGraphs, RecordedStep, key_of
from minivllm.worker.input_batch import InputBatch, InputBuffers
from minivllm.worker.prompt_embeds import PromptVectors
from minivllm.worker.prompt_logprobs import PromptLogprobs, PromptScores
from minivllm.worker.request_state import RequestTable


@dataclass(frozen=True)
class _Decode:
    """A step of one token a request, all of which are sampled. It serves as long as its batch stays the same object."""

    batch: InputBatch
    ctx: ForwardContext
    is_likeliest: bool  # tokens are chosen as the vocabulary's products are made, and there are no logits
    draw: DrawInputs | DeviceDraw | None  # None: that, or sampling is more than this and not part of the step
    key: Hashable | None  # of a captured step, see worker/graphs.py
    recorded: RecordedStep | None = None  # what it is replayed from
    sizes: Sizes = ()  # with these


@dataclass(frozen=True)
class _Decoded:
    """What came of it. A replay gives the same tensors as the one before, so this serves for as long."""

    outputs: tuple[torch.Tensor, ...]
    logits: torch.Tensor | None  # there is this or that
    hidden: torch.Tensor | None
    drawn: Drawn | None  # good if no grammar comes
    on_host: tuple[np.ndarray, np.ndarray] | None  # the same, if that is where it is


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
        captures: CaptureOptions | None = None,
        platform: Platform | None = None,
    ) -> None:
        """group_of_layer: each layer's KV cache group; layers of different groups may share a tensor of kv_caches.

        captures: on a device that captures steps, which, unless enforce_eager; None: the default ones.
        platform: None for one whose memory is the host's.
        """
        block_size = backend.spec.block_size
        self.model, self.backend, self.kv_caches, self.sampler = model, backend, kv_caches, sampler
        # As many again for requests that are preempted.
        num_groups = max(group_of_layer) + 1
        self.table = RequestTable(2 * max_num_seqs, max_model_len, block_size, num_groups=num_groups)
        self._staging = Staging(platform)
        self.capture_shapes: CaptureShapes | None = None
        if self._staging.copies and platform.graphs is not None and not enforce_eager:
            self.capture_shapes = CaptureShapes(captures or CaptureOptions(), max_num_seqs, max_model_len)
        self.buffers = InputBuffers(
            max_num_batched_tokens,
            max_num_seqs,
            -(-max_model_len // block_size),
            num_groups=num_groups,
            staging=self._staging,
            captures=self.capture_shapes,
            new_room=backend.new_room,
        )
        self._draw_buffers = DrawBuffers(self.buffers.most_reqs)
        self._sampling: DeviceSampling | None = None
        most_rows = max_num_seqs if self.capture_shapes is None else self.capture_shapes.padded(max_num_seqs)
        if self._staging.copies:
            self._sampling = DeviceSampling(sampler, platform, self._staging, sampler.vocab_size, most_rows)
        self._group_of_layer = group_of_layer
        spec = OpSpec("cpu" if platform is None else platform.device, torch.float32)
        self.prompt_logprobs = PromptLogprobs(model.compute_logits, spec, self._staging)
        self.prompt_vectors = PromptVectors(backend.spec.dtype, self._staging)
        self._graphs: CapturedGraphs | None = None
        self._recorded: RecordedStep | None = None  # the model of any step
        # The model and what follows it where each request gets a token: by whether the likeliest are chosen, and
        # whether tokens are drawn.
        self._recorded_decodes: dict[tuple[bool, bool], RecordedStep] = {}
        if self.capture_shapes is not None:
            self._graphs = CapturedGraphs(platform.graphs, self.capture_shapes.sizes[-1], self.most_captures)
        self._records = not self._staging.copies and not enforce_eager and native.unavailable is None
        self.record()
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
        self._batch = batch = self._prepare(plan.num_scheduled_tokens)
        given = self.prompt_vectors.of_step(batch)
        if self._is_replayed(batch) and given is None:
            self._run_decode(batch)
        else:
            self._run(batch, given)

    def _prepare(self, num_scheduled_tokens: dict[str, int]) -> InputBatch:
        if self._sampling is None:
            wants_all = not self.prompt_logprobs.is_idle
            return self.buffers.prepare(num_scheduled_tokens, self.table, wants_all=wants_all)
        with torch.inference_mode():
            self._sampling.absorb(self.table)
            self._staging.begin()
            batch = self.buffers.prepare(num_scheduled_tokens, self.table)
            self._sampling.complete(batch)
            return batch

    @torch.inference_mode()
    def _run(self, batch: InputBatch, given: GivenEmbeddings | None) -> None:
        metadata = self._metadata(batch)

        def forward() -> Outputs:
            with native.awake():
                ctx = self._context(metadata, batch.wanted)
                return (self.model.forward(batch.input_ids, batch.positions, ctx, given),)

        if self._recorded is None or given is not None:
            (self._hidden,) = forward()
        else:
            (self._hidden,) = self._recorded.run(self._sizes(batch, metadata), forward)

    # Recorded steps ----------------------------------------------------------

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed from native calls."""
        return self._recorded is not None and self._recorded.recording is not None

    @torch.inference_mode()
    def record(self) -> None:
        """Record the model where steps are recorded, as weights and cache are now."""
        if self._records:
            most = self.buffers.most_tokens, self.buffers.most_reqs, self.buffers.most_tokens
            of_groups = self.backend.most_sizes(self.buffers.most_reqs) * len(self.table.blocks)
            self._recorded = RecordedStep("the model", self._forward_of, (*most, *of_groups))

    def check_recording(self) -> None:
        """Before the first request: have a replay's bits compared with an eager step's, of tokens that are made up.

        They are written to no cache, whose memory would be taken for them, so all that attention sees is zero: the
        first decode, which is checked as a whole, sees more.
        """
        if self._recorded is not None:
            self._run(self.buffers.made_up((min(3, self.table.token_ids.shape[1]), 1)), None)
            self._hidden = None

    def _sizes(self, batch: InputBatch, metadata: list[Any]) -> Sizes:
        """Of a recorded step: tokens, requests, wanted rows, and what the backend says of each KV cache group."""
        of_groups = (size for own in metadata for size in self.backend.sizes_of(own))
        return len(batch.input_ids), len(batch.rows), len(batch.wanted), *of_groups

    @torch.inference_mode()
    def _recorded_decode(self, is_likeliest: bool, draws: bool) -> RecordedStep:
        """The recorded model, and behind it the end of steps of this kind, decodes or others that give each a token."""
        kind = is_likeliest, draws
        if kind not in self._recorded_decodes:
            model = self._recorded.recording

            def end(sizes: Sizes) -> Outputs:
                num_reqs = sizes[1]
                draw = self._draw_buffers.inputs(self.buffers.ends(num_reqs)) if draws else None
                return self._end(model.outputs[0][:num_reqs], is_likeliest, draw)

            self._recorded_decodes[kind] = RecordedStep("a decode", end, model.most, after=model)
        return self._recorded_decodes[kind]

    def _forward_of(self, sizes: Sizes) -> Outputs:
        """The model of a step of these sizes, for a recording."""
        num_tokens, num_reqs, num_wanted, *others = sizes
        ids, positions, wanted, steps = self.buffers.of_sizes(num_tokens, num_reqs, num_wanted)
        each = len(others) // len(steps)
        metadata = [
            self.backend.metadata_of_sizes(step, tuple(others[i * each : (i + 1) * each]))
            for i, step in enumerate(steps)
        ]
        return (self.model.forward(ids, positions, self._context(metadata, wanted)),)

    # Decodes -----------------------------------------------------------------

    def _is_replayed(self, batch: InputBatch) -> bool:
        if self.capture_shapes is not None:
            return batch.is_decode and self.capture_shapes.has(len(batch.rows))
        if batch.is_decode:
            return self.is_recorded
        return batch.gives_only_tokens and self._is_trusted_end(batch.rows)

    def _is_trusted_end(self, rows: np.ndarray) -> bool:
        """Whether a decode has shown that what follows the model is replayed rightly for these rows of the table: no
        prompt is computed twice to find out."""
        is_likeliest = self._takes_likeliest(rows)
        kind = is_likeliest, not is_likeliest and self.sampler.only_draws(rows)
        return kind in self._recorded_decodes and self._recorded_decodes[kind].is_trusted

    def _run_decode(self, batch: InputBatch) -> None:
        if self._decode is None or self._decode.batch is not batch:
            self._decode = self._describe(batch)
        decode = self._decode
        step = partial(self._step, decode)
        if decode.recorded is not None:
            outputs = decode.recorded.run(decode.sizes, step)
        else:
            outputs = self._graphs.run(decode.key, step)
        if self._decoded is None or self._decoded.outputs is not outputs:
            logits, hidden = (None, outputs[0]) if decode.is_likeliest else (outputs[0], None)
            drawn = Drawn(outputs[1], outputs[2]) if len(outputs) > 1 else None
            on_host = None
            if drawn is not None and self._sampling is None:
                on_host = drawn.token_ids.numpy(), drawn.broken.numpy()
            self._decoded = _Decoded(outputs, logits, hidden, drawn, on_host)

    def _describe(self, batch: InputBatch) -> _Decode:
        if self._takes_likeliest(batch.rows):
            return self._decode_of(batch, None, is_likeliest=True)
        draw: DrawInputs | DeviceDraw | None = None
        if self._sampling is not None:
            with torch.inference_mode():
                draw = self._sampling.inputs(batch.rows, batch.ends, len(batch.input_ids))
        elif self.sampler.only_draws(batch.rows):
            draw = self.sampler.draw_inputs(batch.rows, batch.ends, self._draw_buffers)
        return self._decode_of(batch, draw)

    def _takes_likeliest(self, rows: np.ndarray) -> bool:
        """Whether tokens for these rows of the table can be had without their logits, unless a grammar comes."""
        return self._sampling is None and self.model.can_choose and self.sampler.only_likeliest(rows)

    def _decode_of(
        self, batch: InputBatch, draw: DrawInputs | DeviceDraw | None, *, is_likeliest: bool = False
    ) -> _Decode:
        metadata = self._metadata(batch)
        ctx = self._context(metadata, batch.wanted)
        if self._graphs is not None:
            key = key_of(batch.input_ids, batch.positions, metadata, is_likeliest, draw)
            return _Decode(batch, ctx, is_likeliest, draw, key)
        recorded = self._recorded_decode(is_likeliest, draw is not None)
        return _Decode(batch, ctx, is_likeliest, draw, None, recorded, self._sizes(batch, metadata))

    @torch.inference_mode()
    def _step(self, decode: _Decode) -> Outputs:
        """A decode step: logits (or hidden states) and, if they can be made here, tokens and which rows are broken."""
        hidden = self.model.forward(decode.batch.input_ids, decode.batch.positions, decode.ctx)
        return self._end(hidden, decode.is_likeliest, decode.draw)

    def _end(self, hidden: torch.Tensor, is_likeliest: bool, draw: DrawInputs | DeviceDraw | None) -> Outputs:
        if is_likeliest:
            return hidden, *self.model.likeliest(hidden)
        logits = self.model.compute_logits(hidden)
        if draw is None:
            return (logits,)
        drawn = (self._sampling or self.sampler).draw(logits, draw)
        return logits, drawn.token_ids, drawn.broken

    @property
    def most_captures(self) -> int:
        """How many there may be: of every shape, for each way to draw tokens."""
        return len(self._sampling.kinds_of_inputs(1)) * len(self.capture_shapes)

    @torch.inference_mode()
    def capture(self, num_rows: int, max_seq_len: int) -> None:
        """Capture the decode steps of one of `capture_shapes` before a batch has it."""
        self._staging.begin()
        batch = self.buffers.padding(num_rows, max_seq_len)
        self._staging.end()
        # What takes more memory comes first: it then serves the others.
        for draw in reversed(self._sampling.kinds_of_inputs(num_rows)):
            decode = self._decode_of(batch, draw)
            self._graphs.capture(decode.key, partial(self._step, decode))

    def forget_captures(self) -> None:
        """Captures and recordings: the model or the cache lies elsewhere from now on, or nowhere."""
        self._decode = self._decoded = self._recorded = None
        self._recorded_decodes.clear()
        if self._graphs is not None:
            self._graphs.clear()

    def _metadata(self, batch: InputBatch) -> list[Any]:
        """One a KV cache group."""
        return [self.backend.build_metadata(step) for step in batch.steps]

    def _context(self, metadata: list[Any], wanted: torch.Tensor | None) -> ForwardContext:
        return ForwardContext([metadata[group] for group in self._group_of_layer], self.kv_caches, wanted)

    def sample_tokens(self, grammar: GrammarOutput | None = None) -> ModelRunnerOutput:
        """One token for each request whose last known token was in the step, and the logprobs asked for."""
        if self._sampling is not None:
            return self.start_sampling(grammar).result()
        batch, hidden = self._batch, self._hidden
        self._batch = self._hidden = None
        if batch is None:
            return ModelRunnerOutput()
        if hidden is not None:
            return self._sample(batch, hidden, None, grammar)
        decoded = self._decoded
        if decoded.drawn is not None and grammar is None:
            return self._accept_drawn(batch, decoded)
        return self._sample(batch, decoded.hidden, decoded.logits, grammar)

    @property
    def is_asynchronous(self) -> bool:
        """Whether there is `start_sampling`: the device works while the host goes on."""
        return self._sampling is not None

    @torch.inference_mode()
    def start_sampling(self, grammar: GrammarOutput | None = None) -> Handle:
        """As `sample_tokens`, which need not be waited for: the next step takes its tokens from the device."""
        batch, hidden = self._batch, self._hidden
        self._batch = self._hidden = None
        if batch is None:
            return Handle(ModelRunnerOutput)
        sampling, table = self._sampling, self.table
        result = ModelRunnerOutput(batch.request_ids, [[] for _ in batch.request_ids])
        rows = batch.rows[batch.samples]
        prompt_scores: list[PromptScores] = []
        if hidden is not None:
            prompt_scores = self.prompt_logprobs.score(batch, hidden, table)
            if not len(rows):
                self._staging.end()
                return Handle(partial(_with_prompts, result, prompt_scores), sampling.mark())
            last_rows = sampling.rows_on_device(batch)
            last_ids = batch.input_ids.index_select(0, last_rows)
            logits = self.model.compute_logits(hidden.index_select(0, last_rows))
            inputs = sampling.inputs(rows, table.num_tokens[rows], len(rows))
            drawn = sampling.draw(logits, inputs)
        else:
            last_ids, inputs = batch.input_ids, self._decode.draw
            logits, drawn = self._decoded.logits, self._decoded.drawn
        self._staging.end()
        if self.sampler.needs_host:
            sampled = self._sample_on_host(logits[: len(rows)], rows, grammar)
            return Handle(lambda: self._report(batch, sampled, _with_prompts(result, prompt_scores)))
        step, mask = self._sample_batch(rows), self._mask_of(grammar, rows)
        pending = sampling.sample(logits, drawn, inputs, step, last_ids, mask)
        table.advance(rows)
        return Handle(
            lambda: self._report(batch, sampling.output(pending), _with_prompts(result, prompt_scores)),
            pending.arrived,
        )

    def _sample_on_host(
        self, logits: torch.Tensor, rows: np.ndarray, grammar: GrammarOutput | None
    ) -> SamplerOutput:
        """Waits for the logits, and for the tokens before them: the operator's code may look at all of them."""
        self._sampling.absorb(self.table, all_of_it=True)
        sampled = self.sampler(logits.cpu(), self._sample_batch(rows), self._mask_of(grammar, rows))
        self._append(rows, sampled)
        return sampled

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
            self.prompt_vectors.remove_request(row)
            if self._sampling is not None:
                self._sampling.forget(row)

    def _remember(self, request: NewRequestData) -> None:
        self._forget(request.request_id)
        row = self.table.add(request)
        params = request.sampling_params
        self.sampler.add_request(row, params, request.seed, request.eos_token_ids)
        self.prompt_logprobs.add_request(row, params)
        self.prompt_vectors.add_request(row, request.prompt_embeds)

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
        rows = batch.rows[batch.samples]
        if logits is None:
            _with_prompts(result, self.prompt_logprobs.score(batch, hidden, self.table))
            if not len(rows):
                return result
            hidden = batch.sampled(hidden)
            if grammar is None and self._takes_likeliest(rows):
                drawn = Drawn(*self.model.likeliest(hidden))
                return self._accept(batch, rows, self.sampler.accept(drawn, None, rows), result)
            logits = self.model.compute_logits(hidden)
        sampled = self.sampler(logits, self._sample_batch(rows), self._mask_of(grammar, rows))
        return self._accept(batch, rows, sampled, result)

    def _sample_batch(self, rows: np.ndarray) -> SampleBatch:
        return SampleBatch(
            rows=rows,
            num_tokens=self.table.num_tokens[rows],
            num_prompt_tokens=self.table.num_prompt_tokens[rows],
            token_ids=self.table.token_ids,
            has_vectors=self._has_vectors(rows),
        )

    def _accept(
        self, batch: InputBatch, rows: np.ndarray, sampled: SamplerOutput, result: ModelRunnerOutput
    ) -> ModelRunnerOutput:
        """Remember the tokens, and report them. rows: of the table, those that got one."""
        self._append(rows, sampled)
        return self._report(batch, sampled, result)

    def _report(self, batch: InputBatch, sampled: SamplerOutput, result: ModelRunnerOutput) -> ModelRunnerOutput:
        """Add to `result` what was sampled for the batch's samples."""
        is_whole = len(batch.samples) == len(batch.request_ids)
        ids = batch.request_ids if is_whole else [batch.request_ids[i] for i in batch.samples.tolist()]
        tokens = sampled.token_ids.reshape(-1, 1).tolist()
        if sampled.failed:
            for column in sampled.failed:
                tokens[column] = []
            self._blame_vectors(batch.rows[batch.samples], sampled)
            result.failed.update({ids[column]: why for column, why in sampled.failed.items()})
            result.fields_at_fault.update({ids[column]: name for column, name in sampled.fields_at_fault.items()})
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

    def _accept_drawn(self, batch: InputBatch, decoded: _Decoded) -> ModelRunnerOutput:
        """As `_accept`, for all requests of a step that was replayed with its end."""
        books = None if self.sampler.asks_for_logprobs else self.buffers.books
        if books is not None and books.append_drawn(*decoded.on_host):
            return ModelRunnerOutput(batch.request_ids, [[token] for token in decoded.on_host[0].tolist()])
        sampled = self.sampler.accept(decoded.drawn, decoded.logits, batch.rows)
        return self._accept(batch, batch.rows, sampled, ModelRunnerOutput(batch.request_ids))

    def _has_vectors(self, rows: np.ndarray) -> np.ndarray | None:
        """Whose prompts are vectors, [len(rows)] bool; None where nobody's are."""
        if self.prompt_vectors.is_idle:
            return None
        return np.array([self.prompt_vectors.has(row) for row in rows.tolist()])

    def _blame_vectors(self, rows: np.ndarray, sampled: SamplerOutput) -> None:
        """Logits that are no numbers, behind vectors that no token has: these are at fault."""
        for column, why in sampled.failed.items():
            if why == NONFINITE and self.prompt_vectors.has(int(rows[column])):
                sampled.failed[column] = f"with these prompt_embeds {NONFINITE}"
                sampled.fields_at_fault[column] = "prompt_embeds"

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

    def _append(self, rows: np.ndarray, sampled: SamplerOutput) -> None:
        if not sampled.failed:
            self.table.append_tokens(rows, sampled.token_ids)
            return
        going_on = np.ones(len(rows), bool)
        going_on[list(sampled.failed)] = False
        self.table.append_tokens(rows[going_on], sampled.token_ids[going_on])


def _with_prompts(result: ModelRunnerOutput, found: list[PromptScores]) -> ModelRunnerOutput:
    """The same result, with the prompts' scores, which have arrived."""
    for scores in found:
        scores.add_to(result)
    return result
