"""Tables and buffers: that the arrays of a step say what the plan said."""

from __future__ import annotations

import numpy as np
import torch

from minivllm.messages.worker import NewRequestData
from minivllm.sampling_params import SamplingParams
from minivllm.worker.input_batch import InputBatch, InputBuffers
from minivllm.worker.request_state import RequestTable

BLOCK = 32


def new_request(request_id: str, prompt: list[int], blocks: list[int], *, prior=(), computed: int = 0):
    return NewRequestData(request_id, prompt, list(prior), SamplingParams(), 0, [], [blocks], computed)


def test_a_mixed_step_is_laid_out_request_by_request():
    table = RequestTable(num_rows=4, max_model_len=128, block_size=BLOCK)
    prompt = list(range(100, 170))
    table.add(new_request("long", prompt, [7, 3, 5]))
    table.add(new_request("decoding", [1, 2, 3], [9], prior=[50, 51], computed=4))
    batch = InputBuffers(64, 4, 4).prepare({"decoding": 1, "long": 40}, table)
    assert batch.request_ids == ["decoding", "long"]
    assert batch.input_ids.tolist() == [51, *prompt[:40]]
    assert batch.positions.tolist() == [4, *range(40)]
    slots = [7 * BLOCK + i for i in range(32)] + [3 * BLOCK + i for i in range(8)]
    assert batch.steps[0].slot_mapping.tolist() == [9 * BLOCK + 4, *slots]
    assert batch.steps[0].query_start_loc.tolist() == [0, 1, 41]
    assert batch.steps[0].seq_lens.tolist() == [5, 40]
    assert batch.steps[0].block_table[:, :2].tolist() == [[9, 0], [7, 3]]
    assert batch.samples.tolist() == [0]  # the prompt's chunk ends before its last token
    assert batch.wanted.tolist() == [0]


def test_hidden_states_are_wanted_where_a_token_is_sampled_or_of_all_or_of_one():
    table = RequestTable(num_rows=4, max_model_len=128, block_size=BLOCK)
    table.add(new_request("long", list(range(70)), [7, 3, 5]))
    table.add(new_request("short", [1, 2, 3], [9]))
    buffers = InputBuffers(64, 4, 4)
    hidden = torch.arange(43).view(-1, 1)
    both = {"long": 40, "short": 3}
    for wants_all, num_wanted in ((False, 1), (True, 43)):
        batch = buffers.prepare(both, table, wants_all=wants_all)
        assert len(batch.wanted) == num_wanted and batch.sampled(hidden[batch.wanted]).tolist() == [[42]]
    none = buffers.prepare({"long": 40}, table)
    assert none.wanted.tolist() == [0] and len(none.sampled(hidden[none.wanted])) == 0


def test_the_chunk_that_holds_the_last_known_token_samples():
    table = RequestTable(num_rows=1, max_model_len=128, block_size=BLOCK)
    table.add(new_request("a", [4, 5, 6, 7], [2], computed=2))
    batch = InputBuffers(8, 1, 4).prepare({"a": 2}, table)
    assert (batch.samples.tolist(), batch.wanted.tolist()) == ([0], [1])


def test_sampled_tokens_are_the_next_steps_input():
    table = RequestTable(num_rows=2, max_model_len=128, block_size=BLOCK)
    row = table.add(new_request("a", [4], [2]))
    table.append_tokens(np.array([row]), np.array([77]))
    table.num_computed_tokens[row] = 1
    batch = InputBuffers(8, 1, 4).prepare({"a": 1}, table)
    assert (batch.input_ids.tolist(), batch.positions.tolist(), batch.samples.tolist()) == ([77], [1], [0])


def test_the_token_after_the_longest_context_is_not_kept():
    table = RequestTable(num_rows=1, max_model_len=4, block_size=BLOCK)
    row = table.add(new_request("a", [1, 2, 3, 4], [0]))
    table.append_tokens(np.array([row]), np.array([5]))
    assert table.num_tokens[row] == 4


def test_a_row_given_away_shows_nothing_of_its_last_request():
    table = RequestTable(num_rows=1, max_model_len=128, block_size=BLOCK)
    table.add(new_request("a", list(range(90)), [4, 5, 6]))
    table.remove("a")
    table.add(new_request("b", [1, 2], [8]))
    batch = InputBuffers(8, 1, 4).prepare({"b": 2}, table)
    assert batch.steps[0].block_table[:, :1].tolist() == [[8]]
    assert batch.input_ids.tolist() == [1, 2]


def test_more_requests_than_rows_make_the_table_grow_and_keep_what_it_holds():
    table = RequestTable(num_rows=2, max_model_len=64, block_size=BLOCK)
    for i in range(9):
        table.add(new_request(str(i), [i, i + 1], [i]))
    ids = [str(i) for i in range(9)]
    rows = table.rows(ids)
    assert sorted(rows) == sorted(set(rows))
    batch = InputBuffers(32, 16, 2).prepare(dict.fromkeys(ids, 2), table)
    assert batch.input_ids.tolist() == [token for i in range(9) for token in (i, i + 1)]
    assert batch.steps[0].block_table[:, 0].tolist() == list(range(9))


def test_forgetting_an_unknown_request_is_no_error():
    assert RequestTable(1, 64, BLOCK).remove("nobody") is None


def fields(batch: InputBatch) -> list:
    """All that a step reads."""
    step = batch.steps[0]
    arrays = [batch.rows, batch.begins, batch.ends, batch.samples, batch.input_ids, batch.positions, batch.wanted]
    arrays += [step.query_start_loc, step.seq_lens, step.block_table, step.slot_mapping]
    return [batch.request_ids, *(array.tolist() for array in arrays)]


def test_a_step_a_token_further_is_the_same_object_and_says_what_a_new_one_would():
    table = RequestTable(num_rows=4, max_model_len=128, block_size=BLOCK)
    table.add(new_request("a", [4, 5, 6], [2], computed=2))
    table.add(new_request("b", list(range(50)), [7, 3], computed=49))
    buffers, seen = InputBuffers(8, 4, 4), []
    for i in range(40):
        if i == 29:
            table.append_blocks(table.row_of["a"], [[5]])
        if i == 14:
            table.append_blocks(table.row_of["b"], [[6]])
        batch = buffers.prepare({"a": 1, "b": 1}, table)
        seen.append(batch)
        assert fields(batch) == fields(InputBuffers(8, 4, 4).prepare({"a": 1, "b": 1}, table))
        rows = table.rows(["a", "b"])
        table.append_tokens(rows, np.array([100 + i, 200 + i]))
        table.num_computed_tokens[rows] += 1
    assert len({id(batch) for batch in seen}) < 10


def test_a_step_of_other_requests_or_from_elsewhere_is_made_anew():
    table = RequestTable(num_rows=4, max_model_len=128, block_size=BLOCK)
    for name, block in (("a", 2), ("b", 3)):
        table.add(new_request(name, [4, 5, 6, 7], [block], computed=1))
    row_a, row_b = table.row_of["a"], table.row_of["b"]
    buffers = InputBuffers(8, 4, 4)
    table.num_computed_tokens[:] = 3
    buffers.prepare({"a": 1, "b": 1}, table)
    table.append_tokens(np.array([row_a]), np.array([9]))
    table.num_computed_tokens[row_a] = 4
    both = buffers.prepare({"a": 1, "b": 1}, table)  # b has not come further
    assert both.positions.tolist() == [4, 3] and both.samples.tolist() == [0, 1]
    assert buffers.prepare({"b": 1, "a": 1}, table).positions.tolist() == [3, 4]
    assert buffers.prepare({"b": 1}, table).rows.tolist() == [row_b]
    table.num_computed_tokens[row_b] = 0
    assert buffers.prepare({"b": 4}, table).input_ids.tolist() == [4, 5, 6, 7]
