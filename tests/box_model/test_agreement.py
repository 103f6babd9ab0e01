"""What a draft's guesses are worth: runs of the large model are counted as speculation would make them."""

from __future__ import annotations

import pytest

from examples.box_model.agreement import steps, table


@pytest.mark.parametrize(
    "right, guessed, runs",
    [
        ([True] * 10, 4, 2),  # four guesses and a token of its own, twice
        ([False] * 3, 4, 3),
        ([True, False, True, True], 4, 2),
        ([True] * 4, 1, 2),
        ([], 4, 0),
    ],
)
def test_a_run_confirms_the_guesses_up_to_the_first_wrong_one(right, guessed, runs):
    assert steps(right, guessed) == runs


def test_the_table_counts_tokens_agreement_and_tokens_a_run():
    text = table({"sums": [[True, True, False]], "stories": [[False]]}, 4)
    assert "| sums | 3 | 66.7% | 3.00 |" in text
    assert "| stories | 1 | 0.0% | 1.00 |" in text
    assert text.splitlines()[-1] == "| all | 4 | 50.0% | 2.00 |"
