"""The ops' door to the native kernels: whether they can serve a spec, and how tensors are handed over.

Knows nothing of any operation, nor how the extension is found (`utils/native.py`). It sees addresses, shapes and
strides (in elements), never torch; callers keep the tensors alive and check shapes before they call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from minivllm.ops.op import OpSpec
from minivllm.utils.native import lib as lib  # the kernels themselves, for the ops
from minivllm.utils.native import unavailable

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/cpu/types.h


def why_not(spec: OpSpec) -> str | None:
    """Why the native kernels cannot serve `spec`: no extension, another device, or another dtype."""
    if unavailable is not None:
        return unavailable
    if spec.device != "cpu":
        return f"needs a CPU, got {spec.device}"
    if spec.dtype not in DTYPE_CODES:
        return f"no {spec.dtype} kernel"
    return None


def float32_why_not(spec: OpSpec) -> str | None:
    """The same for what works on logits."""
    if spec.dtype != torch.float32:
        return f"logits are {spec.dtype}, not torch.float32"
    return why_not(spec)


def dtype_code(tensor: torch.Tensor) -> int:
    """The extension's code for a tensor's dtype.

    Raises:
        ValueError: the extension has no kernels for it.
    """
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"no native kernel for {tensor.dtype}; convert to float32, bfloat16 or float16")
    return code


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Kernels' threads stay awake between calls inside: waking one lasts longer than many a short prompt's kernel."""
    if lib is not None:
        lib.stay_awake(True)
    try:
        yield
    finally:
        if lib is not None:
            lib.stay_awake(False)


_HUGE_PAGE = 2 << 20


def huge_pages(nbytes: int) -> torch.Tensor:
    """Untouched memory of so many bytes, on a cache line; on huge pages where it is large and the system has them.

    A weight is streamed through, and so is the KV cache: with pages of 4 KiB a processor spends a third of the time
    looking them up.
    """
    alignment = _HUGE_PAGE if nbytes >= _HUGE_PAGE else 64
    storage = torch.empty(nbytes + alignment - 1, dtype=torch.uint8)
    start = -storage.data_ptr() % alignment
    if alignment == _HUGE_PAGE and lib is not None:
        lib.advise_huge_pages(storage.data_ptr() + start, nbytes // _HUGE_PAGE * _HUGE_PAGE)
    return storage[start : start + nbytes]


_PAGE = 4096


class MemoryTaker:
    """Has the system give all memory of fresh tensors of bytes, from their beginnings on, while others use them.

    A thread of the lowest priority does it, without Python's lock. Where the system cannot (Linux before 5.14), it is
    done when the object is made.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors  # they stay as long as the thread may touch them
        self._taker = None
        self._is_held = False
        if lib is not None:
            try:
                self._taker = lib.MemoryTaker([t.data_ptr() for t in tensors], [t.nbytes for t in tensors])
                return
            except RuntimeError:
                pass
        _write_a_zero_a_page(tensors)

    def hold(self, on: bool) -> None:
        """Whether to begin with no further page. Returns at once.

        While a page is being taken, whoever wants other memory of the system or gives it back waits (mmap_lock), for a
        thread that only runs where nobody else wants to.
        """
        if self._taker is not None and on != self._is_held:
            self._taker.hold(on)
            self._is_held = on

    def wait(self) -> None:
        """Until all of it is there."""
        if self._taker is not None:
            self._taker.wait()

    def stop(self) -> None:
        """What is not taken by now is not. The tensors may lose their memory from here on."""
        if self._taker is not None:
            self._taker.stop()


def _write_a_zero_a_page(tensors: list[torch.Tensor]) -> None:
    with ThreadPoolExecutor(max_workers=2) as threads:  # most of it is waiting for the system
        list(threads.map(lambda tensor: tensor.view(-1).numpy()[::_PAGE].fill(0), tensors))
