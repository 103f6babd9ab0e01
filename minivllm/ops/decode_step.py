"""The bookkeeping between two decode steps of the same requests: natively one call each, where numpy takes a dozen.

A tenth of a small model's step would else be spent here: behind a step's kernels every line of Python is cold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minivllm.utils.native import lib, unavailable


@dataclass(frozen=True)
class TableColumns:
    """Of the request table, by row."""

    num_computed_tokens: np.ndarray  # int64
    num_tokens: np.ndarray  # int64
    token_ids: np.ndarray  # [num_rows, max_model_len] int32


@dataclass(frozen=True)
class StepColumns:
    """Of a step of one token a request, in batch order; [num_reqs] unless said otherwise."""

    rows: np.ndarray  # int64, in the table
    begins: np.ndarray  # int64: tokens computed before the step
    ends: np.ndarray  # int64: and after it
    positions: np.ndarray  # int64
    seq_lens: np.ndarray  # int32
    slots: list[np.ndarray]  # int64, one a KV cache group
    input_ids: np.ndarray  # int64


def move_on_reference(step: StepColumns, table: TableColumns) -> bool:
    """Move the inputs a token further, each in its block, if that is where every request is; False: nothing changed."""
    rows, is_next = step.rows, table.num_computed_tokens[step.rows] == step.ends
    if not (is_next & (table.num_tokens[rows] == step.ends + 1)).all():
        return False
    for numbers in (step.begins, step.ends, step.positions, step.seq_lens, *step.slots):
        numbers += 1
    step.input_ids[:] = table.token_ids[rows, step.begins]
    return True


def append_drawn_reference(drawn: np.ndarray, broken: np.ndarray, rows: np.ndarray, table: TableColumns) -> bool:
    """Append a token to each row ([num_reqs] int64) that has room; False, and nothing done, if one is broken."""
    if broken.any():
        return False
    fits = table.num_tokens[rows] < table.token_ids.shape[1]
    rows, drawn = rows[fits], drawn[fits]
    table.token_ids[rows, table.num_tokens[rows]] = drawn
    table.num_tokens[rows] += 1
    return True


class DecodeBooks:
    """Both for one step, made when its arrays are: they must stay where they are."""

    def __init__(self, step: StepColumns, table: TableColumns) -> None:
        self._step, self._table = step, table
        at, num_reqs = _address, len(step.rows)
        tokens = (at(table.num_tokens), at(table.token_ids), table.token_ids.shape[1])
        self._rest_of_move = (
            num_reqs, at(step.rows), at(table.num_computed_tokens), *tokens, at(step.begins), at(step.ends),
            at(step.positions), at(step.seq_lens), at(step.slots[0]), at(step.input_ids),
        )  # fmt: skip
        self._rest_of_append = (at(step.rows), *tokens)
        self._drawn: tuple[np.ndarray, np.ndarray] | None = None
        self._append: tuple[int, ...] = ()

    def move_on(self) -> bool:
        """As `move_on_reference`."""
        if unavailable is not None:
            return move_on_reference(self._step, self._table)
        has_moved = lib.move_on(*self._rest_of_move)
        if has_moved:
            for slots in self._step.slots[1:]:
                slots += 1
        return has_moved

    def append_drawn(self, drawn: np.ndarray, broken: np.ndarray) -> bool:
        """As `append_drawn_reference`."""
        if unavailable is not None:
            return append_drawn_reference(drawn, broken, self._step.rows, self._table)
        if self._drawn is None or self._drawn[0] is not drawn or self._drawn[1] is not broken:
            self._drawn = drawn, broken
            self._append = len(drawn), _address(drawn), _address(broken), *self._rest_of_append
        return lib.append_drawn(*self._append)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
