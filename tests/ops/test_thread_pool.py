"""The pool under the worst of circumstances: more threads than processors, jobs of different kernels in turn."""

import threading

import numpy as np

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
