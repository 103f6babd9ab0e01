"""Sampling on a device that works while the host goes on: tokens stay there, and come back when they are asked for.

Temperature, truncation and noise are drawn for all rows, in a captured step if there is one. Rows that ask for more
(constraints, penalties, grammars: `device_logits.py`) are then drawn anew, and the logprobs asked for are read. How a
row is sampled depends on its own request. Owns the tokens that are drawn and not yet known to the host, and puts them
into the next step's input where they lie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from minivllm.messages.worker import ModelRunnerOutput
from minivllm.ops.likeliest_tokens import KEYS_AT_ONCE
from minivllm.ops.op import OpSpec
from minivllm.ops.sampling import broken_rows, gumbel_argmax, top_k_top_p_min_p
from minivllm.platforms.platform import Event, Platform
from minivllm.sample.logprobs import LogprobsReader, TokenValues
from minivllm.sample.sampler import NONFINITE, Drawn, Sampler, SamplerOutput, contradiction
from minivllm.sample.step import GrammarMask, SampleBatch
from minivllm.worker.buffers import Mirror, Staging
from minivllm.worker.device_logits import DeviceLogits
from minivllm.worker.input_batch import InputBatch
from minivllm.worker.prompt_logprobs import PROMPT_ROWS_AT_ONCE
from minivllm.worker.request_state import RequestTable

_NO_TOKEN_LEFT = 2  # of a row that its request's constraints broke; 1: the model did
_LOGPROBS_AT_ONCE = 32  # rows: they are copied
_RESULTS = 3  # two steps may be under way while a third one's tokens are read


@dataclass(frozen=True)
class DeviceDraw:
    """What temperature, truncation and noise need of each row; tensors on the device that stay where they are."""

    temperature: torch.Tensor  # [M] float32
    seeds: torch.Tensor  # [M] int64
    positions: torch.Tensor  # [M] int64
    # All three or none: [M] int32, float32, float32.
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None


@dataclass
class _Pending:
    """A step's tokens, on their way to the host."""

    rows: np.ndarray  # [M] int64 of the table; -1: its request is gone, or the token is known
    positions: np.ndarray  # [M] int64
    token_ids: np.ndarray  # [M] int64, in pinned memory: read it when `arrived`
    broken: np.ndarray  # [M] uint8, likewise
    arrived: Event
    num_output_tokens: np.ndarray  # [M] int64, before this one
    forbidding: dict[int, list[str]]  # by column: the fields that forbid tokens; the request may be gone by then
    # Columns, and what they asked for, in pinned memory.
    logprobs: list[tuple[list[int], TokenValues]] = field(default_factory=list)


class Handle:
    """A step's result; `result()` waits for it, in any thread."""

    def __init__(self, make: Callable[[], ModelRunnerOutput], arrived: Event | None = None) -> None:
        """arrived: what `make` reads is there when this has come; None: it is there."""
        self._make, self._arrived = make, arrived

    def result(self) -> ModelRunnerOutput:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._make()


class DeviceSampling:
    def __init__(
        self, sampler: Sampler, platform: Platform, staging: Staging, vocab_size: int, max_num_rows: int
    ) -> None:
        """sampler: for what requests ask, and what only a host can do; max_num_rows: of a step's samples, padding
        included."""
        spec = OpSpec(platform.device, torch.float32, {"vocab_size": vocab_size})
        self._sampler, self._platform, self._staging = sampler, platform, staging
        self._choose, self._truncate = gumbel_argmax.select(spec), top_k_top_p_min_p.select(spec)
        self._read = LogprobsReader(spec, is_logprobs=sampler.is_logprobs)
        self._logits = DeviceLogits(platform, staging, vocab_size, max_num_rows)
        self._temperature, self._top_p, self._min_p = (
            staging.mirror((max_num_rows,), np.float32) for _ in range(3)
        )
        self._top_k = staging.mirror((max_num_rows,), np.int32)
        self._seeds, self._positions = (staging.mirror((max_num_rows,), np.int64) for _ in range(2))
        self._rows, self._targets, self._columns = (
            staging.mirror((max_num_rows,), np.int64) for _ in range(3)
        )
        self._last = torch.zeros(
            max_num_rows, dtype=torch.int64, device=platform.device
        )  # the last step's tokens
        pinned = [platform.new_pinned((max_num_rows,), torch.int64) for _ in range(_RESULTS)]
        self._results = [(tokens, platform.new_pinned((max_num_rows,), torch.uint8)) for tokens in pinned]
        self._turn = 0
        self._pending: deque[_Pending] = deque()

    @staticmethod
    def num_bytes(vocab_size: int) -> int:
        """Of the device, at most, beyond copies of a step's logits: what reading logprobs takes meanwhile (rows of a
        prompt's logits, and the keys that order some). What stays is seen when a runner is warmed up."""
        return vocab_size * (4 * PROMPT_ROWS_AT_ONCE + 32 * KEYS_AT_ONCE)

    # Tokens that only the device knows -------------------------------------------

    def absorb(self, table: RequestTable, *, all_of_it: bool = False) -> None:
        """Take what has arrived into the table. Steps before the last one kept are waited for, or that one as well."""
        while self._pending and (all_of_it or len(self._pending) > 1 or self._pending[0].arrived.query()):
            pending = self._pending.popleft()
            pending.arrived.synchronize()
            known = pending.rows >= 0
            rows, positions = pending.rows[known], pending.positions[known]
            fits = positions < table.token_ids.shape[1]
            table.token_ids[rows[fits], positions[fits]] = pending.token_ids[known][fits]

    def forget(self, row: int) -> None:
        """The request in a row of the table is gone; another may have it."""
        for pending in self._pending:
            pending.rows[pending.rows == row] = -1
        self._logits.counts.forget(row)

    def complete(self, batch: InputBatch) -> None:
        """Put the tokens that the device alone knows into the batch's input."""
        if not self._pending:
            return
        pending = self._pending[-1]
        column_of = {row: column for column, row in enumerate(pending.rows.tolist()) if row >= 0}
        found = [
            (token, column_of[row])
            for token, row, end in zip(batch.last_rows.tolist(), batch.rows.tolist(), batch.ends.tolist())
            if row in column_of and pending.positions[column_of[row]] == end - 1
        ]
        if not found:
            return
        self._targets.host[: len(found)], self._columns.host[: len(found)] = np.array(found).T
        self._targets.upload(len(found))
        self._columns.upload(len(found))
        targets, columns = self._targets.device[: len(found)], self._columns.device[: len(found)]
        batch.input_ids.index_copy_(0, targets, self._last.index_select(0, columns))

    # A step ------------------------------------------------------------------

    def rows_on_device(self, batch: InputBatch) -> torch.Tensor:
        """[num_sampled] int64, on the device: which rows of the hidden states predict new tokens."""
        return self._upload(self._rows, batch.last_rows[batch.samples])

    def inputs(self, rows: np.ndarray, num_tokens: np.ndarray, num_rows: int) -> DeviceDraw:
        """For a draw of `num_rows`, the first of them those of these rows of the table."""
        columns = self._sampler.columns(rows)
        draw = {
            "temperature": self._upload(self._temperature, columns.temperature.numpy(), num_rows),
            "seeds": self._upload(self._seeds, columns.seeds.numpy(), num_rows),
            "positions": self._upload(self._positions, num_tokens, num_rows),
        }
        if columns.truncates:
            draw |= {
                "top_k": self._upload(self._top_k, columns.top_k.numpy(), num_rows),
                "top_p": self._upload(self._top_p, columns.top_p.numpy(), num_rows),
                "min_p": self._upload(self._min_p, columns.min_p.numpy(), num_rows),
            }
        return DeviceDraw(**draw)

    def kinds_of_inputs(self, num_rows: int) -> tuple[DeviceDraw, DeviceDraw]:
        """All that `inputs` may give for so many rows, where they lie: without truncation and with it."""
        plain = [place.device[:num_rows] for place in (self._temperature, self._seeds, self._positions)]
        truncated = [place.device[:num_rows] for place in (self._top_k, self._top_p, self._min_p)]
        return DeviceDraw(*plain), DeviceDraw(*plain, *truncated)

    def draw(self, logits: torch.Tensor, inputs: DeviceDraw) -> Drawn:
        """A token a row; logits stay as they are. A row's token does not depend on whether others truncate."""
        if inputs.top_k is None:
            return Drawn(*self._choose(logits, inputs.temperature, inputs.seeds, inputs.positions))
        is_sampled = inputs.temperature > 0
        scaled = logits / torch.where(is_sampled, inputs.temperature, 1.0).unsqueeze(1)
        self._truncate(scaled, inputs.top_k, inputs.top_p, inputs.min_p)
        return Drawn(*self._choose(scaled, is_sampled.float(), inputs.seeds, inputs.positions))

    def sample(
        self,
        logits: torch.Tensor,
        drawn: Drawn,
        inputs: DeviceDraw,
        batch: SampleBatch,
        last_ids: torch.Tensor,
        grammar: GrammarMask | None,
    ) -> _Pending:
        """Have all that the batch asks for on its way to the host, and remember its tokens.

        logits: [M or more, vocab_size] float32, left as they are; drawn: by `draw`, of all rows, which is overwritten
        where a request asks for more; last_ids: [M or more] int64, each one's last token; inputs: what was drawn with.
        """
        asked = self._sampler.asked_logprobs(batch.rows)
        changes = self._sampler.describe(batch, grammar)
        anew = changes.columns
        if not self._sampler.is_raw:  # logprobs are those of processed logits
            anew = anew.union(*(each.columns.tolist() for each in asked))
        columns, changed = sorted(anew), None
        if columns:
            index = self._send(columns)
            changed = logits.index_select(0, index)
            is_nonfinite = broken_rows(changed)
            is_empty = self._logits.change(changed, columns, changes, batch, last_ids)
            tokens = self._warp_and_choose(changed, inputs, index)
            broken = torch.where(is_nonfinite, 1, torch.where(is_empty, _NO_TOKEN_LEFT, 0)).to(torch.uint8)
            drawn.token_ids.index_copy_(0, index, tokens)
            drawn.broken.index_copy_(0, index, broken)
        logprobs = []
        for each in asked:
            for begin in range(0, len(each.columns), _LOGPROBS_AT_ONCE):
                part = slice(begin, begin + _LOGPROBS_AT_ONCE)
                own = each.columns[part].tolist()
                index = self._send(own)
                if self._sampler.is_raw:
                    rows = logits.index_select(0, index)
                else:
                    rows = changed.index_select(0, self._send([columns.index(column) for column in own]))
                also = None if each.named is None else self._staging.send(each.named[part])
                values = self._read(rows, drawn.token_ids.index_select(0, index), each.num_likeliest, also)
                logprobs.append((own, values.to_host(self._staging.fetch)))
        forbidding = {
            column: self._sampler.forbidding(column, batch, grammar) for column in changes.constrained
        }
        return self._keep(drawn, batch, forbidding, logprobs)

    def _warp_and_choose(self, logits: torch.Tensor, inputs: DeviceDraw, index: torch.Tensor) -> torch.Tensor:
        """A token for each row of `logits`, which are processed in place. index: [rows] int64, which of `inputs`."""
        temperature = inputs.temperature.index_select(0, index)
        is_sampled = temperature > 0
        logits.div_(torch.where(is_sampled, temperature, 1.0).unsqueeze(1))
        if inputs.top_k is not None:
            self._truncate(logits, *(x.index_select(0, index) for x in (inputs.top_k, inputs.top_p, inputs.min_p)))
        seeds, positions = inputs.seeds.index_select(0, index), inputs.positions.index_select(0, index)
        return self._choose(logits, is_sampled.float(), seeds, positions)[0]

    def _keep(
        self,
        drawn: Drawn,
        batch: SampleBatch,
        forbidding: dict[int, list[str]],
        logprobs: list[tuple[list[int], TokenValues]],
    ) -> _Pending:
        """Remember the tokens of these rows, and have them come to the host."""
        count = len(batch.rows)
        self._last[:count].copy_(drawn.token_ids[:count])
        self._turn = (self._turn + 1) % _RESULTS
        tokens, broken = (place[:count] for place in self._results[self._turn])
        tokens.copy_(drawn.token_ids[:count], non_blocking=True)
        broken.copy_(drawn.broken[:count], non_blocking=True)
        arrived = self._platform.record_event()
        pending = _Pending(
            rows=batch.rows.copy(), positions=batch.num_tokens, token_ids=tokens.numpy(), broken=broken.numpy(),
            arrived=arrived, num_output_tokens=batch.num_output_tokens, forbidding=forbidding, logprobs=logprobs,
        )  # fmt: skip
        self._pending.append(pending)
        return pending

    @staticmethod
    def output(pending: _Pending) -> SamplerOutput:
        """What was drawn, when it has arrived."""
        failed: dict[int, str] = {}
        at_fault: dict[int, str] = {}
        for column in np.flatnonzero(pending.broken).tolist():
            failed[column] = NONFINITE
            fields = pending.forbidding.get(column)
            if pending.broken[column] == _NO_TOKEN_LEFT and fields:
                failed[column] = contradiction(fields, int(pending.num_output_tokens[column]))
                at_fault[column] = fields[0]
        logprobs = {}
        for columns, values in pending.logprobs:
            logprobs |= zip(columns, values.lists_of_rows())
        return SamplerOutput(pending.token_ids.copy(), logprobs, failed, at_fault)

    def mark(self) -> Event:
        """The end of what the device was given so far."""
        return self._platform.record_event()

    def _send(self, columns: list[int]) -> torch.Tensor:
        return self._staging.send(np.array(columns, np.int64))

    def _upload(self, mirror: Mirror, values: np.ndarray, num_rows: int | None = None) -> torch.Tensor:
        """On the device; rows behind those given hold what they held."""
        mirror.host[: len(values)] = values
        mirror.upload(len(values))
        return mirror.device[: len(values) if num_rows is None else num_rows]
