"""Sampling on a device that works while the host goes on: tokens stay there, and come back when they are asked for.

Temperature, truncation and noise are the device's. What a request asks for beyond (penalties, grammars, logprobs, …) is
`Sampler`'s, on the host, for that request's row alone: so how a row is sampled depends on its own request. Owns the
tokens that are drawn and not yet known to the host, and puts them into the next step's input where they lie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from minivllm.messages.worker import ModelRunnerOutput
from minivllm.ops.op import OpSpec
from minivllm.ops.sampling import gumbel_argmax, top_k_top_p_min_p
from minivllm.platforms.platform import Event, Platform
from minivllm.sample.sampler import NONFINITE, Drawn, Sampler, SamplerOutput
from minivllm.worker.buffers import Mirror, Staging
from minivllm.worker.input_batch import InputBatch
from minivllm.worker.request_state import RequestTable

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


class Handle:
    """A step's result; `result()` waits for it, in any thread."""

    def __init__(self, make: Callable[[], ModelRunnerOutput]) -> None:
        self._make = make

    def result(self) -> ModelRunnerOutput:
        return self._make()


class DeviceSampling:
    def __init__(
        self, sampler: Sampler, platform: Platform, staging: Staging, vocab_size: int, max_num_rows: int
    ) -> None:
        """sampler: for what is done on the host; max_num_rows: of a step's samples, padding included."""
        spec = OpSpec(platform.device, torch.float32, {"vocab_size": vocab_size})
        self._sampler, self._platform, self._staging = sampler, platform, staging
        self._choose, self._truncate = gumbel_argmax.select(spec), top_k_top_p_min_p.select(spec)
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

    # Tokens that only the device knows -------------------------------------------

    def absorb(self, table: RequestTable) -> None:
        """Take what has arrived into the table. Of steps before the last one kept, all is waited for."""
        while self._pending and (len(self._pending) > 1 or self._pending[0].arrived.query()):
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
        """`batch.sampled_rows`, on the device."""
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

    def draw(self, logits: torch.Tensor, inputs: DeviceDraw) -> Drawn:
        """A token a row; logits stay as they are. A row's token does not depend on whether others truncate."""
        if inputs.top_k is None:
            return Drawn(*self._choose(logits, inputs.temperature, inputs.seeds, inputs.positions))
        is_sampled = inputs.temperature > 0
        scaled = logits / torch.where(is_sampled, inputs.temperature, 1.0).unsqueeze(1)
        self._truncate(scaled, inputs.top_k, inputs.top_p, inputs.min_p)
        return Drawn(*self._choose(scaled, is_sampled.float(), inputs.seeds, inputs.positions))

    def keep(self, drawn: Drawn, rows: np.ndarray, num_tokens: np.ndarray) -> _Pending:
        """Remember the tokens of these rows, and have them come to the host."""
        count = len(rows)
        self._last[:count].copy_(drawn.token_ids[:count])
        self._turn = (self._turn + 1) % _RESULTS
        tokens, broken = (place[:count] for place in self._results[self._turn])
        tokens.copy_(drawn.token_ids[:count], non_blocking=True)
        broken.copy_(drawn.broken[:count], non_blocking=True)
        pending = _Pending(
            rows.copy(), num_tokens.copy(), tokens.numpy(), broken.numpy(), self._platform.record_event()
        )
        self._pending.append(pending)
        return pending

    def known(self, pending: _Pending, columns: np.ndarray) -> None:
        """These columns of the step were sampled on the host: nothing of them is pending."""
        pending.rows[columns] = -1

    @staticmethod
    def output(pending: _Pending) -> SamplerOutput:
        """What was drawn; waits for it."""
        pending.arrived.synchronize()
        failed = dict.fromkeys(np.flatnonzero(pending.broken).tolist(), NONFINITE)
        return SamplerOutput(pending.token_ids.copy(), {}, failed)

    def _upload(self, mirror: Mirror, values: np.ndarray, num_rows: int | None = None) -> torch.Tensor:
        """On the device; rows behind those given hold what they held."""
        mirror.host[: len(values)] = values
        mirror.upload(len(values))
        return mirror.device[: len(values) if num_rows is None else num_rows]
