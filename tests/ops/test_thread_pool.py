"""The pool under the worst of circumstances: more threads than processors, jobs of different kernels in turn."""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from minivllm.ops import native

ROUNDS = 20_000
LARGEST = 512 * 601
SIZES = [1024, 1536, 512 * 5, 512 * 37, LARGEST]  # two to five threads' worth, so that jobs differ in what is claimed
FLOAT32 = 0


def aligned(num_bytes: int) -> np.ndarray:
    buffer = np.zeros(num_bytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + num_bytes]


def test_a_late_worker_never_mixes_two_jobs():
    words = aligned(LARGEST).view(np.uint64)
    words[:] = np.random.default_rng(0).integers(0, 2**63, len(words), np.uint64)
    expected = {size: np.bitwise_xor.reduce(words[: size // 8]) for size in SIZES}
    signs = [aligned(4 * 50_001).view(np.float32) for _ in range(2)]
    wrong: list[tuple[int, int]] = []

    def run(starter: int) -> None:
        own, address = signs[starter].ctypes.data, words.ctypes.data
        for i in range(ROUNDS):
            size = SIZES[(starter + i) % len(SIZES)]
            native.lib.scale(FLOAT32, own, len(signs[starter]), -1.0)
            if native.lib.read_memory(address, size) != expected[size]:
                wrong.append((i, size))

    for sign in signs:
        sign[:] = 1
    before = native.lib.num_threads()
    native.lib.set_num_threads(5)
    try:
        starters = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for starter in starters:
            starter.start()
        for starter in starters:
            starter.join()
    finally:
        native.lib.set_num_threads(before)
    assert wrong == []
    assert all((sign == 1).all() for sign in signs)  # turned an even number of times


GAPS, BRIEF_S, GAP_S = 200, 24e-6, 60e-6  # of a gap; threads wait awake for 30 µs by themselves, inside for 1 ms
TRIES = 10  # where the starter is held up in too many gaps, nothing is seen


@pytest.mark.skipif(sys.platform != "linux", reason="how often a thread has slept is read from /proc")
def test_threads_wait_awake_through_brief_gaps_and_inside_through_longer_ones_and_sleep_outside_however_it_was_left():
    words = aligned(LARGEST)

    def naps(gap_s: float) -> int:
        """How often the other threads of the pool went to sleep while kernels ran with gaps between them."""
        before = sum(map(times_slept, others))
        for _ in range(GAPS):
            native.lib.read_memory(words.ctypes.data, len(words))
            until = time.perf_counter() + gap_s
            while time.perf_counter() < until:
                pass
        return sum(map(times_slept, others)) - before

    before, known = native.lib.num_threads(), set(os.listdir("/proc/self/task"))
    native.lib.set_num_threads(2)
    try:
        native.lib.read_memory(words.ctypes.data, len(words))
        others = set(os.listdir("/proc/self/task")) - known
        assert others
        for _ in range(TRIES):
            with contextlib.suppress(KeyError), native.awake():
                inside = naps(GAP_S)
                raise KeyError
            brief, outside = naps(BRIEF_S), naps(GAP_S)
            if max(brief, inside) < outside / 4 and outside > GAPS / 4:
                break
        else:
            pytest.fail(f"of {GAPS} gaps threads slept in {inside} inside, {outside} outside, and {brief} brief ones")
    finally:
        native.lib.set_num_threads(before)


def times_slept(thread: str) -> int:
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("voluntary_ctxt_switches"))
