"""Memory that is taken behind its users: all of it, and never over what they write meanwhile."""

import time

import numpy as np
import torch

from minivllm.ops import native
from tests.resident_memory import resident_bytes

SIZE = 64 << 20


def test_what_is_written_while_memory_is_taken_stays_written():
    tensors = [native.huge_pages(SIZE) for _ in range(2)]
    taker = native.MemoryTaker(tensors)
    for start in range(0, SIZE, 1 << 20):  # from the other end, so that they meet
        for tensor in tensors:
            tensor[SIZE - start - 4097 : SIZE - start] = 7
    taker.wait()
    expected = np.zeros(SIZE, np.uint8)
    for start in range(0, SIZE, 1 << 20):
        expected[SIZE - start - 4097 : SIZE - start] = 7
    for tensor in tensors:
        assert np.array_equal(tensor.numpy(), expected)


def test_a_taker_that_is_stopped_lets_go_of_the_tensors():
    tensors = [native.huge_pages(1 << 30)]
    taker = native.MemoryTaker(tensors)
    began = time.monotonic()
    taker.stop()
    taker.stop()
    assert time.monotonic() - began < 10  # a step is 2 MiB; all of it would be 512 of them
    assert not tensors[0][:4096].any()


def test_a_taker_that_is_held_takes_nothing_until_it_may_go_on():
    tensors = [native.huge_pages(SIZE)]
    taker = native.MemoryTaker([*tensors])
    taker.hold(True)
    before, now = -1, resident_bytes(tensors[0])
    while now != before:  # the page in hand
        time.sleep(0.2)
        before, now = now, resident_bytes(tensors[0])
    assert now < SIZE
    taker.hold(False)
    taker.wait()
    assert resident_bytes(tensors[0]) == SIZE


def test_a_taker_that_is_held_can_be_stopped():
    taker = native.MemoryTaker([native.huge_pages(SIZE)])
    taker.hold(True)
    taker.stop()


def test_tensors_without_a_whole_page_are_nothing_to_take():
    native.MemoryTaker([torch.zeros(100, dtype=torch.uint8)]).wait()
