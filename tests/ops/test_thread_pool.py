"""The pool under the worst of circumstances: more threads than processors, tiny jobs one after another, two who start them."""

import threading

import numpy as np

from minivllm.utils import native

ROUNDS = 4000
SIZES = [512, 1024, 1536, 4096, 512 * 37]  # one to five threads' worth, so that jobs differ in what is claimed


def test_a_late_worker_never_mixes_two_jobs():
    words = np.random.default_rng(0).integers(0, 2**63, 512 * 37 // 8 * 2 + 8, np.uint64)
    start = -words.ctypes.data % 64 // 8
    expected = {size: np.bitwise_xor.reduce(words[start : start + size // 8]) for size in SIZES}
    wrong: list[tuple[int, int]] = []

    def run(first: int) -> None:
        for i in range(ROUNDS):
            size = SIZES[(first + i) % len(SIZES)]
            found = native.lib.read_memory(words.ctypes.data + 8 * start, size)
            if found != expected[size]:
                wrong.append((i, size))

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
