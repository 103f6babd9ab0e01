"""How often each penalised request has had each token, on the device: in step with tokens the host has not seen.

Owns a row of counts for as many requests as a step can have. A request's counts follow from its tokens: one that finds
its row taken by another, as after a long preemption, is counted anew. Tokens are entered when the one to follow them is
sampled: all but the last are the host's by then, and the last is the model's input, on the device.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch

from minivllm.ops.op import OpSpec
from minivllm.ops.penalties import apply_penalties, count_tokens
from minivllm.platforms.platform import Platform
from minivllm.sample.step import Penalised, SampleBatch
from minivllm.worker.buffers import Staging

_NOTHING = Penalised(1.0, 0.0, 0.0)


class PenaltyCounts:
    def __init__(self, platform: Platform, staging: Staging, vocab_size: int, num_slots: int) -> None:
        """num_slots: requests penalised in one step, at most."""
        spec = OpSpec(platform.device, torch.float32, {"vocab_size": vocab_size})
        self._apply, self._count = apply_penalties.select(spec), count_tokens.select(spec)
        self._staging, self._shape, self._device = staging, (num_slots, vocab_size), platform.device
        self._counts: torch.Tensor | None = None  # made when somebody is penalised
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # by table row, the least recently sampled first
        self._free = list(reversed(range(num_slots)))
        self._num_counted = np.zeros(num_slots, np.int64)  # tokens of the slot's request

    def forget(self, row: int) -> None:
        """The request in a row of the table is gone; another may have it."""
        slot = self._slot_of.pop(row, None)
        if slot is not None:
            self._free.append(slot)

    def penalise(
        self,
        logits: torch.Tensor,
        columns: list[int],
        penalties: dict[int, Penalised],
        batch: SampleBatch,
        last_ids: torch.Tensor,
    ) -> None:
        """In place.

        logits: [len(columns), vocab_size] float32, of these columns of the batch, the penalised ones among them;
        last_ids: [columns of the batch] int64, each one's last token.
        """
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        slot_of = self._slots([int(batch.rows[column]) for column in penalties])
        self._catch_up(dict(zip(penalties, slot_of)), batch, last_ids)
        slots = dict(zip(penalties, slot_of))
        rows = self._staging.send(np.array([slots.get(column, 0) for column in columns], np.int64))
        numbers = np.array([penalties.get(column, _NOTHING) for column in columns], np.float32)
        self._apply(logits, self._counts, rows, *self._staging.send(np.ascontiguousarray(numbers.T)))

    def _slots(self, rows: list[int]) -> list[int]:
        """One for each of these rows of the table, if need be those of requests that are not among them."""
        for row in rows:
            if row in self._slot_of:
                self._slot_of.move_to_end(row)
        for row in rows:
            if row not in self._slot_of:
                slot = self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]
                self._slot_of[row] = slot
                self._num_counted[slot] = 0
                self._counts[slot].zero_()
        return [self._slot_of[row] for row in rows]

    def _catch_up(self, slots: dict[int, int], batch: SampleBatch, last_ids: torch.Tensor) -> None:
        """Enter the tokens of these columns that are not counted yet."""
        late: list[tuple[int, np.ndarray, int]] = []  # slot, tokens, how many of them are the prompt's
        lasts: list[tuple[int, int, bool]] = []  # slot, column, whether it is the prompt's
        for column, slot in slots.items():
            num_tokens, num_prompt = int(batch.num_tokens[column]), int(batch.num_prompt_tokens[column])
            begin = max(int(self._num_counted[slot]), batch.first_token(column))
            if begin < num_tokens:
                lasts.append((slot, column, num_tokens == num_prompt))
            if begin < num_tokens - 1:
                tokens = batch.token_ids[batch.rows[column], begin : num_tokens - 1]
                late.append((slot, tokens, max(0, num_prompt - begin)))
            self._num_counted[slot] = num_tokens
        if late:
            rows = np.concatenate([np.full(len(tokens), slot) for slot, tokens, _ in late])
            ids = np.concatenate([tokens for _, tokens, _ in late])
            is_prompt = np.concatenate([np.arange(len(tokens)) < num for _, tokens, num in late])
            self._enter(rows, self._staging.send(ids.astype(np.int64)), is_prompt)
        if lasts:
            rows, columns, is_prompt = map(np.array, zip(*lasts))
            self._enter(rows, last_ids.index_select(0, self._staging.send(columns.astype(np.int64))), is_prompt)

    def _enter(self, slots: np.ndarray, token_ids: torch.Tensor, is_prompt: np.ndarray) -> None:
        send = self._staging.send
        self._count(self._counts, send(slots.astype(np.int64)), token_ids, send(is_prompt.astype(np.uint8)))
