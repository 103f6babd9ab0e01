"""Sizes as people write them, and names as they misspell them."""

from __future__ import annotations

import pytest

from minivllm.utils.text import nearest, one_line, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("-1", -1), ("1k", 1000), ("1K", 1024), ("1.5k", 1500), ("25.6k", 25600),
        ("2m", 2_000_000), ("2M", 2 << 20), ("64Mi", 64 << 20), ("64MiB", 64 << 20), ("4GiB", 4 << 30),
        ("4G", 4 << 30), ("4GB", 4 * 10**9), ("4g", 4 * 10**9), ("1T", 1 << 40), (" 8 GiB ", 8 << 30),
        ("0.5Ki", 512), ("9007199254740993", 2**53 + 1),
    ],
)  # fmt: skip
def test_a_size_may_carry_a_suffix(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "1.5", "0.0001k", "4X", "4iB", "1e3", "0x10", "4 4", "auto", "nan"])
def test_what_is_no_whole_number_is_refused(text: str):
    with pytest.raises(ValueError, match="whole number"):
        parse_size(text)


def test_the_nearest_name_is_found_and_a_far_one_is_not():
    names = ["max_model_len", "max_num_seqs", "dtype"]
    assert nearest("max_modle_len", names) == "max_model_len"
    assert nearest("quux", names) is None


def test_a_message_is_put_on_one_line():
    assert one_line("a\n  b\tc\n") == "a b c"
