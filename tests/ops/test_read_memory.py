"""The kernel that benchmarks/roofline.py takes the memory's bandwidth with reads every word."""

import numpy as np
import pytest

from minivllm.utils import native


@pytest.mark.parametrize("num_bytes", [0, 512, 512 * 1001])
def test_it_reads_every_word_once(num_bytes, isa, num_threads):
    buffer = np.random.default_rng(0).integers(0, 2**63, num_bytes // 8 + 8, np.uint64)
    start = -buffer.ctypes.data % 64 // 8
    words = buffer[start : start + num_bytes // 8]
    assert native.lib.read_memory(buffer.ctypes.data + 8 * start, num_bytes) == np.bitwise_xor.reduce(words)


def test_a_part_of_a_turn_is_refused():
    with pytest.raises(ValueError, match="512"):
        native.lib.read_memory(64, 100)
