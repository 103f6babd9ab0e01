"""What requests ask to have changed in their logits, done where the logits are, without waiting for them.

Knows how each kind of change is applied on the device; what to change comes from `Sampler.describe`, in numbers.
"""

from __future__ import annotations

import numpy as np
import torch

from minivllm.ops.bitmask import apply_bitmask
from minivllm.ops.op import OpSpec
from minivllm.ops.sampling import broken_rows
from minivllm.platforms.platform import Platform
from minivllm.sample.step import Edit, Forced, LogitsChanges, SampleBatch
from minivllm.worker.buffers import Staging
from minivllm.worker.penalty_counts import PenaltyCounts

_MASKED = float("-inf")
_NO_TOKEN = -2  # no request's last one


class DeviceLogits:
    def __init__(self, platform: Platform, staging: Staging, vocab_size: int, max_num_rows: int) -> None:
        """max_num_rows: changed in a step, at most."""
        spec = OpSpec(platform.device, torch.float32, {"vocab_size": vocab_size})
        self._apply_bitmask = apply_bitmask.select(spec)
        self._vocab_size, self._staging = vocab_size, staging
        self.counts = PenaltyCounts(platform, staging, vocab_size, max_num_rows)

    def change(
        self,
        logits: torch.Tensor,
        columns: list[int],
        changes: LogitsChanges,
        batch: SampleBatch,
        last_ids: torch.Tensor,
    ) -> torch.Tensor:
        """In place; which rows have nothing left to choose from, [len(columns)] bool, on the device.

        logits: [len(columns), vocab_size] float32, contiguous: those of these columns of the batch, all that have
        changes among them; last_ids: [columns of the batch] int64, each one's last token, on the device.
        """
        place_of = {column: place for place, column in enumerate(columns)}
        own_last = last_ids.index_select(0, self._staging.send(np.array(columns, np.int64)))
        if changes.allowed:
            self._mask(logits, {place_of[column]: words for column, words in changes.allowed.items()})
        if changes.edits:
            self._edit(logits, [(place_of[column], edit) for column, edit in changes.edits], own_last)
        if changes.forced:
            self._force(logits, {place_of[column]: forced for column, forced in changes.forced.items()}, own_last)
        is_empty = broken_rows(logits)
        if changes.penalties:
            self.counts.penalise(logits, columns, changes.penalties, batch, last_ids)
        return is_empty

    def _mask(self, logits: torch.Tensor, words_of: dict[int, np.ndarray]) -> None:
        num_words = -(-self._vocab_size // 32)
        words = np.stack([words[:num_words] for words in words_of.values()]).view(np.int32)
        rows = self._staging.send(np.array(list(words_of), np.int64))
        self._apply_bitmask(logits, rows, self._staging.send(words))

    def _edit(self, logits: torch.Tensor, edits: list[tuple[int, Edit]], last_ids: torch.Tensor) -> None:
        """No token has more than one number other than -inf, so the order of the additions changes nothing."""
        counts = [len(edit.token_ids) for _, edit in edits]
        rows, behind = (np.repeat(each, counts) for each in zip(*((row, edit.behind) for row, edit in edits)))
        ids = np.concatenate([edit.token_ids for _, edit in edits])
        rows, behind, places = self._staging.send(np.stack([rows, behind, rows * self._vocab_size + ids]))
        values = self._staging.send(np.concatenate([edit.values for _, edit in edits]))
        applies = (behind < 0) | (behind == last_ids.index_select(0, rows))
        logits.view(-1).scatter_add_(0, places, torch.where(applies, values, 0.0))

    def _force(self, logits: torch.Tensor, forced_of: dict[int, Forced], last_ids: torch.Tensor) -> None:
        most = max(len(forced.behind) for forced in forced_of.values())
        # Of each row: what is forced otherwise, then pairs of a last token and what is forced behind it.
        table = np.full((len(logits), 1 + 2 * most), _NO_TOKEN, np.int64)
        table[:, 0] = -1
        for row, forced in forced_of.items():
            table[row, 0] = forced.otherwise
            for i, pair in enumerate(forced.behind.items()):
                table[row, 1 + 2 * i : 3 + 2 * i] = pair
        otherwise, *pairs = self._staging.send(np.ascontiguousarray(table.T))
        chosen = otherwise
        for behind, then in zip(pairs[::2], pairs[1::2]):
            chosen = torch.where(last_ids == behind, then, chosen)
        is_forced = (chosen >= 0).unsqueeze(1)
        place = chosen.clamp_min(0).unsqueeze(1)
        kept = torch.where(is_forced, 0.0, logits.gather(1, place))
        logits.masked_fill_(is_forced, _MASKED).scatter_(1, place, kept)
