"""From logits to tokens, in vLLM's order: constraints, penalties, temperature, truncation, noise.

Owns what each request asked of sampling, by its row in the worker's tables. Holds no random state: the noise
of a token is a function of the request's seed and the token's position (`ops/sampling.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from minivllm.messages.engine import LogprobsLists
from minivllm.ops.bitmask import apply_bitmask
from minivllm.ops.op import OpSpec
from minivllm.ops.sampling import gumbel_argmax, nonfinite_rows, top_k_top_p_min_p
from minivllm.sample.constraints import AllowedTokens, BadWords, LogitBias, MinTokens
from minivllm.sample.custom import CustomProcessors
from minivllm.sample.logprobs import LogprobsReader
from minivllm.sample.penalties import Penalties
from minivllm.sample.step import GrammarMask, LogitsChanges, LogitsStep, SampleBatch
from minivllm.sample.thinking import ThinkingBudget
from minivllm.sampling_params import SamplingParams

NONFINITE = "the model gave logits that are not finite numbers; the request cannot go on"
NOTHING_LEFT = "a logits processor leaves no token that could be chosen"


@dataclass(frozen=True)
class DrawInputs:
    """What temperature and noise need to know of each row of logits."""

    temperature: torch.Tensor  # [M] float32, 0 for the likeliest
    seeds: torch.Tensor  # [M] int64
    positions: torch.Tensor  # [M] int64: tokens known


class DrawBuffers:
    """Memory for `DrawInputs` that stays: a step that is replayed reads where it was recorded."""

    def __init__(self, max_num_rows: int) -> None:
        self.temperature, self.seeds = np.zeros(max_num_rows, np.float32), np.zeros(max_num_rows, np.int64)

    def inputs(self, num_tokens: np.ndarray) -> DrawInputs:
        """The first rows, of requests that know so many tokens ([M] int64, read when a token is drawn, not here)."""
        num_rows = len(num_tokens)
        return DrawInputs(*map(torch.from_numpy, (self.temperature[:num_rows], self.seeds[:num_rows], num_tokens)))


@dataclass(frozen=True)
class Drawn:
    """A token for each row, and which rows none can be drawn from."""

    token_ids: torch.Tensor  # [M] int64
    broken: torch.Tensor  # [M] uint8


@dataclass(frozen=True)
class AskedLogprobs:
    """Some requests of a batch, and which tokens' logprobs each wants beside the sampled one's."""

    columns: np.ndarray  # [L] int64
    num_likeliest: int  # -1: the whole vocabulary
    named: np.ndarray | None = None  # [L, k] int64, in their place


@dataclass(frozen=True)
class SamplerOutput:
    """Columns as in the batch."""

    token_ids: np.ndarray  # [M] int64; meaningless where failed
    logprobs: dict[int, LogprobsLists] = field(default_factory=dict)  # one row each, of those who asked
    failed: dict[int, str] = field(default_factory=dict)
    fields_at_fault: dict[int, str] = field(default_factory=dict)  # of those failed by what they ask for themselves


class Sampler:
    def __init__(
        self,
        vocab_size: int,
        logprobs_mode: str = "raw_logprobs",
        *,
        device: str = "cpu",
        custom: CustomProcessors | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        spec = OpSpec(device, torch.float32, {"vocab_size": vocab_size})
        self._nonfinite_rows = nonfinite_rows.select(spec)
        self._truncate = top_k_top_p_min_p.select(spec)
        self._choose = gumbel_argmax.select(spec)
        self._apply_bitmask = apply_bitmask.select(spec)
        self.is_raw, self.is_logprobs = logprobs_mode.startswith("raw"), logprobs_mode.endswith("logprobs")
        self._read = LogprobsReader(spec, is_logprobs=self.is_logprobs)
        # The order is vLLM's.
        self._before_custom: list[LogitsStep] = [
            AllowedTokens(vocab_size),
            BadWords(vocab_size),
            MinTokens(vocab_size),
            LogitBias(vocab_size),
            ThinkingBudget(vocab_size),
        ]
        self._custom = custom
        self._after_custom: list[LogitsStep] = [Penalties(vocab_size)]
        self._steps = [*self._before_custom, *([custom] if custom is not None else []), *self._after_custom]
        self._num_logprobs: dict[int, int] = {}  # by table row
        self._logprob_token_ids: dict[int, list[int]] = {}  # by table row
        self._form_fields: dict[int, str] = {}  # by table row: what its user calls `structured_outputs`
        self._columns = _Columns()

    # Requests ----------------------------------------------------------------

    def add_request(self, row: int, params: SamplingParams, seed: int, eos_token_ids: list[int]) -> None:
        """Remember what the request in a table row asks for. seed: 0 … 2**64 - 1."""
        self.remove_request(row)
        self._columns.set(row, params, seed)
        if params.logprobs is not None:
            self._num_logprobs[row] = params.logprobs
        if params.logprob_token_ids is not None:
            self._logprob_token_ids[row] = params.logprob_token_ids
        if params.structured_outputs is not None:
            self._form_fields[row] = params.structured_outputs.param
        for step in self._steps:
            step.add_request(row, params, eos_token_ids)

    def remove_request(self, row: int) -> None:
        self._num_logprobs.pop(row, None)
        self._logprob_token_ids.pop(row, None)
        self._form_fields.pop(row, None)
        for step in self._steps:
            step.remove_request(row)

    # A step ------------------------------------------------------------------

    def __call__(
        self, logits: torch.Tensor, batch: SampleBatch, grammar: GrammarMask | None = None
    ) -> SamplerOutput:
        """One token for each row of `logits` ([M, vocab_size] float32, which is changed)."""
        if grammar is None and self.only_draws(batch.rows):
            inputs = self.draw_inputs(batch.rows, batch.num_tokens, DrawBuffers(len(batch.rows)))
            return self.accept(self.draw(logits, inputs), logits, batch.rows)
        columns, asking = self._columns.of(batch.rows), self._asking(batch.rows)
        failed = dict.fromkeys(self._nonfinite_rows(logits), NONFINITE)
        values = self._reported(logits, asking) if self.is_raw else None
        if grammar is not None:
            self._apply_bitmask(logits, *grammar.tensors())
        changed = any([step.apply(logits, batch) for step in self._before_custom])
        at_fault: dict[int, str] = {}
        if changed or grammar is not None:
            for i in self._nonfinite_rows(logits):
                if i not in failed:
                    fields = self.forbidding(i, batch, grammar)  # one at least has forbidden all
                    failed[i], at_fault[i] = contradiction(fields, int(batch.num_output_tokens[i])), fields[0]
        why = self._process(logits, batch, failed)
        for step in self._after_custom:
            step.apply(logits, batch)
        noise, why_warped = self._warp(logits, batch, columns)
        if why or why_warped:
            failed = dict.fromkeys(range(len(logits)), why or why_warped) | failed
        token_ids, _ = self._choose(logits, *noise)
        if not self.is_raw:
            values = self._reported(logits, asking)
        logprobs = self._logprobs(values, token_ids, batch.rows, asking)
        return SamplerOutput(token_ids.numpy(), logprobs, failed, at_fault)

    @property
    def _changes_nothing(self) -> bool:
        """Whether no request asks for a change of its logits before the temperature."""
        return self._custom is None and all(step.is_idle for step in self._steps)

    # Temperature and noise alone, in one pass: the same division, so the same bits as step by step.

    def only_draws(self, rows: np.ndarray) -> bool:
        """Whether the requests in these rows ask for nothing but temperature and noise, a grammar aside."""
        if not self._changes_nothing or self._columns.truncates[rows].any():
            return False
        return self.is_raw or not self._asking(rows)

    def only_likeliest(self, rows: np.ndarray) -> bool:
        """Whether the requests in these rows ask for the likeliest token and nothing else: nobody sees their logits."""
        if not self.only_draws(rows) or self._columns.temperature[rows].any() or self._asking(rows):
            return False
        return not self._form_fields or self._form_fields.keys().isdisjoint(rows.tolist())

    @property
    def needs_host(self) -> bool:
        """Whether there is something that only the host can do: code of the operator's."""
        return self._custom is not None

    def describe(self, batch: SampleBatch, grammar: GrammarMask | None) -> LogitsChanges:
        """All changes before the temperature, for a device that makes them by itself."""
        assert not self.needs_host, "what the operator's code does has no description"
        changes = LogitsChanges()
        if grammar is not None:
            for column, words in zip(grammar.columns.tolist(), grammar.bitmask):
                changes.allow_only(column, words)
        for step in self._steps:
            step.describe(batch, changes)
        return changes

    def columns(self, rows: np.ndarray) -> _Chosen:
        """What the requests in these rows ask of temperature, truncation and noise."""
        return self._columns.of(rows)

    def draw_inputs(self, rows: np.ndarray, num_tokens: np.ndarray, buffers: DrawBuffers) -> DrawInputs:
        """num_tokens: [M] int64, known of each request; read when a token is drawn, not here."""
        buffers.temperature[: len(rows)] = self._columns.temperature[rows]
        buffers.seeds[: len(rows)] = self._columns.seeds[rows]
        return buffers.inputs(num_tokens)

    def draw(self, logits: torch.Tensor, inputs: DrawInputs) -> Drawn:
        """For requests that `only_draws`; logits stay as they are."""
        return Drawn(*self._choose(logits, inputs.temperature, inputs.seeds, inputs.positions))

    @property
    def asks_for_logprobs(self) -> bool:
        """Whether any known request does."""
        return bool(self._num_logprobs)

    def accept(self, drawn: Drawn, logits: torch.Tensor | None, rows: np.ndarray) -> SamplerOutput:
        """What was drawn, with the logprobs asked for. logits: None where there are none, see `only_likeliest`."""
        asking = self._asking(rows)
        failed = dict.fromkeys(np.flatnonzero(drawn.broken.numpy()).tolist(), NONFINITE)
        logprobs = self._logprobs(self._reported(logits, asking), drawn.token_ids, rows, asking)
        return SamplerOutput(drawn.token_ids.numpy(), logprobs, failed)

    def forbidding(self, i: int, batch: SampleBatch, grammar: GrammarMask | None) -> list[str]:
        """The fields by which column i's request forbids tokens now, as its user wrote them."""
        fields = [step.field for step in self._before_custom if step.forbids_tokens(i, batch)]
        if grammar is not None and i in grammar.columns:
            fields.insert(0, self._form_fields.get(int(batch.rows[i]), "structured_outputs"))
        return fields

    def _process(self, logits: torch.Tensor, batch: SampleBatch, failed: dict[int, str]) -> str | None:
        """The operator's processors, in place; adds to `failed` whom they leave nothing. Why nobody can go on."""
        if self._custom is None:
            return None
        why = self._custom.apply(logits, batch)
        for i in self._nonfinite_rows(logits):
            failed.setdefault(i, NOTHING_LEFT)
        return why

    def _warp(
        self, logits: torch.Tensor, batch: SampleBatch, columns: _Chosen
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], str | None]:
        """Divide by temperature and truncate, in place; what is left for the noise to know, and as `_process`.

        The division is done here, so that a row's bits are the same beside rows that truncate and beside
        none; dividing by 1 changes nothing.
        """
        temperature = columns.temperature
        is_sampled = temperature > 0
        if is_sampled.any():
            logits.div_(torch.where(is_sampled, temperature, 1.0).unsqueeze(1))
        why = self._custom.apply_invariant(logits, is_sampled) if self._custom is not None else None
        if columns.truncates:
            self._truncate(logits, columns.top_k, columns.top_p, columns.min_p)
        return (is_sampled.float(), columns.seeds, torch.from_numpy(batch.num_tokens)), why

    # Logprobs ----------------------------------------------------------------

    def asked_logprobs(self, rows: np.ndarray) -> list[AskedLogprobs]:
        """What the requests in these rows of the table want, those together that want as much."""
        if not self._num_logprobs:
            return []
        groups: dict[tuple[int, int], list[int]] = {}
        for column, row in enumerate(rows.tolist()):
            if row in self._num_logprobs:
                named = self._logprob_token_ids.get(row)
                key = (self._num_logprobs[row], 0) if named is None else (0, len(named))
                groups.setdefault(key, []).append(column)
        return [
            AskedLogprobs(
                np.array(columns),
                num_likeliest,
                np.array([self._logprob_token_ids[int(rows[i])] for i in columns], np.int64) if num_named else None,
            )
            for (num_likeliest, num_named), columns in groups.items()
        ]

    def _asking(self, rows: np.ndarray) -> list[int]:
        """Columns of the requests that want logprobs."""
        if not self._num_logprobs:
            return []
        return [i for i, row in enumerate(rows.tolist()) if row in self._num_logprobs]

    @staticmethod
    def _reported(logits: torch.Tensor, asking: list[int]) -> torch.Tensor | None:
        """What logprobs are read from, [len(asking), vocab_size]: a copy."""
        return logits[torch.tensor(asking)] if asking else None

    def _logprobs(
        self, kept: torch.Tensor | None, token_ids: torch.Tensor, rows: np.ndarray, asking: list[int]
    ) -> dict[int, LogprobsLists]:
        """kept: as `_reported` gave it."""
        found: dict[int, LogprobsLists] = {}
        place_of = {column: place for place, column in enumerate(asking)}
        for asked in self.asked_logprobs(rows):
            columns = asked.columns.tolist()
            logits = kept[[place_of[column] for column in columns]] if len(columns) < len(asking) else kept
            also = None if asked.named is None else torch.from_numpy(asked.named)
            values = self._read(logits, token_ids[columns], asked.num_likeliest, also)
            found |= zip(columns, values.lists_of_rows())
        return found


def contradiction(fields: list[str], num_output_tokens: int) -> str:
    """What to say of constraints that forbid every token."""
    verb = "leaves" if len(fields) == 1 else "together leave"
    return (
        f"{' and '.join(fields)} {verb} no token that could come next, after {num_output_tokens} tokens of output; "
        "allow more"
    )


class _Chosen:
    """The columns of one batch, each gathered when it is asked for: most batches need two of them."""

    def __init__(self, columns: _Columns, rows: np.ndarray) -> None:
        self._columns, self._rows = columns, rows
        self.truncates = bool(columns.truncates[rows].any())

    @property
    def temperature(self) -> torch.Tensor:
        return torch.from_numpy(self._columns.temperature[self._rows])

    @property
    def top_k(self) -> torch.Tensor:
        return torch.from_numpy(self._columns.top_k[self._rows])

    @property
    def top_p(self) -> torch.Tensor:
        return torch.from_numpy(self._columns.top_p[self._rows])

    @property
    def min_p(self) -> torch.Tensor:
        return torch.from_numpy(self._columns.min_p[self._rows])

    @property
    def seeds(self) -> torch.Tensor:
        return torch.from_numpy(self._columns.seeds[self._rows])


class _Columns:
    """Numbers every request has, by table row; grown as rows are used."""

    def __init__(self) -> None:
        self.temperature = np.zeros(0, np.float32)
        self.top_k = np.zeros(0, np.int32)
        self.top_p = np.zeros(0, np.float32)
        self.min_p = np.zeros(0, np.float32)
        self.seeds = np.zeros(0, np.int64)
        self.truncates = np.zeros(0, bool)

    def set(self, row: int, params: SamplingParams, seed: int) -> None:
        if row >= len(self.seeds):
            self._grow(max(row + 1, 2 * len(self.seeds), 64))
        self.temperature[row] = 0.0 if params.is_greedy else params.temperature
        self.top_k[row], self.top_p[row], self.min_p[row] = params.top_k, params.top_p, params.min_p
        self.truncates[row] = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self.seeds[row] = np.uint64(seed).astype(np.int64)  # the same bits

    def _grow(self, num_rows: int) -> None:
        for name, column in vars(self).items():
            longer = np.zeros(num_rows, column.dtype)
            longer[: len(column)] = column
            setattr(self, name, longer)

    def of(self, rows: np.ndarray) -> _Chosen:
        return _Chosen(self, rows)
