"""The books between two decode steps: the native calls against numpy's, and what they refuse to touch."""

from __future__ import annotations

import numpy as np
import pytest

from minivllm.ops.decode_step import (
    DecodeBooks,
    StepColumns,
    TableColumns,
    append_drawn_reference,
    move_on_reference,
)

NUM_ROWS, MAX_LEN, NUM_GROUPS = 12, 40, 2


def make(num_reqs: int, seed: int = 0) -> tuple[StepColumns, TableColumns]:
    """A step, and a table that is one token further."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(NUM_ROWS)[:num_reqs].astype(np.int64)
    ends = rng.integers(1, MAX_LEN - 1, num_reqs)
    table = TableColumns(
        np.zeros(NUM_ROWS, np.int64), np.zeros(NUM_ROWS, np.int64), rng.integers(0, 99, (NUM_ROWS, MAX_LEN), np.int32)
    )
    table.num_computed_tokens[rows] = ends
    table.num_tokens[rows] = ends + 1
    slots = list(rng.integers(0, 1000, (NUM_GROUPS, num_reqs)))
    input_ids = rng.integers(0, 99, num_reqs)
    return StepColumns(rows, ends - 1, ends, ends - 1, ends.astype(np.int32), slots, input_ids), table


def arrays(*columns: StepColumns | TableColumns) -> list[list]:
    return [np.array(values).tolist() for each in columns for values in vars(each).values()]


@pytest.mark.parametrize("num_reqs", [1, 2, 7, 12])
def test_moving_on_gives_what_numpy_gives(num_reqs: int):
    (step, table), (other, other_table) = make(num_reqs), make(num_reqs)
    before = np.array(step.slots)
    assert DecodeBooks(step, table).move_on() and move_on_reference(other, other_table)
    assert arrays(step, table) == arrays(other, other_table)
    assert (np.array(step.slots) == before + 1).all()
    assert step.input_ids.tolist() == [table.token_ids[row, end - 1] for row, end in zip(step.rows, step.ends)]
    assert not DecodeBooks(step, table).move_on()  # the table is where the step is now


@pytest.mark.parametrize("column", ["num_computed_tokens", "num_tokens"])
@pytest.mark.parametrize("change", [-1, 1])
def test_nothing_moves_when_one_request_is_elsewhere(column: str, change: int):
    for move in (lambda step, table: DecodeBooks(step, table).move_on(), move_on_reference):
        step, table = make(5)
        getattr(table, column)[step.rows[-1]] += change
        before = arrays(step, table)
        assert not move(step, table)
        assert arrays(step, table) == before


def test_drawn_tokens_are_appended_where_they_fit_and_none_if_one_is_broken():
    drawn, sound = np.arange(100, 105), np.zeros(5, np.uint8)
    tables = []
    for append in (
        lambda step, table, broken: DecodeBooks(step, table).append_drawn(drawn, broken),
        lambda step, table, broken: append_drawn_reference(drawn, broken, step.rows, table),
    ):
        step, table = make(5)
        full, row = step.rows[3], step.rows[0]
        table.num_tokens[full] = MAX_LEN
        before = arrays(table)
        assert not append(step, table, np.array([0, 0, 1, 0, 0], np.uint8))
        assert arrays(table) == before
        end = table.num_tokens[row]
        assert append(step, table, sound)
        assert (table.num_tokens[row], table.token_ids[row, end]) == (end + 1, 100)
        assert table.num_tokens[full] == MAX_LEN
        tables.append(arrays(table))
    assert tables[0] == tables[1]
