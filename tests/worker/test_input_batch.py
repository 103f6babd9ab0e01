"""Tables and buffers: that the arrays of a step say what the plan said."""

from __future__ import annotations

import numpy as np

from minivllm.messages.worker import NewRequestData
from minivllm.sampling_params import SamplingParams
from minivllm.worker.input_batch import InputBuffers
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
    assert batch.steps[0].block_table.tolist() == [[9, 0], [7, 3]]
    assert batch.samples.tolist() == [0]  # the prompt's chunk ends before its last token
    assert batch.sampled_rows.tolist() == [0]


def test_the_chunk_that_holds_the_last_known_token_samples():
    table = RequestTable(num_rows=1, max_model_len=128, block_size=BLOCK)
    table.add(new_request("a", [4, 5, 6, 7], [2], computed=2))
    batch = InputBuffers(8, 1, 4).prepare({"a": 2}, table)
    assert (batch.samples.tolist(), batch.sampled_rows.tolist()) == ([0], [1])


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
    assert batch.steps[0].block_table.tolist() == [[8]]
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
