"""How long work takes: a device's own clock where there is one, and a share of what the machine can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 256 << 20  # more than any card's second-level cache holds


class Clock:
    def __init__(self, device: str) -> None:
        self.device = device
        self.is_cuda = device == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES if self.is_cuda else 1, dtype=torch.uint8, device=device)

    def seconds(self, work: Callable[[], object], *, times: int = 20, is_cold: bool = True) -> float:
        """The median of so many runs, after three. is_cold: with nothing of its data in the cache."""
        for _ in range(3):
            work()
        self.wait()
        return statistics.median(self._once(work, is_cold) for _ in range(times))

    def _once(self, work: Callable[[], object], is_cold: bool) -> float:
        if is_cold:
            self._flush.zero_()
        if not self.is_cuda:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


class Ceilings:
    """What this card does at best, measured now: bytes/s of reading and copying, bf16 FLOP/s of a large product."""

    def __init__(self, clock: Clock, *, size: int = 1 << 30, product: int = 8192) -> None:
        data = torch.empty(size // 4, dtype=torch.float32, device=clock.device)
        data.fill_(1)
        self.read = data.nbytes / clock.seconds(lambda: data.sum(), is_cold=False)
        other = torch.empty_like(data)
        self.copy = 2 * data.nbytes / clock.seconds(lambda: other.copy_(data), is_cold=False)
        # A cache that is read and a result that is small is a read; the larger of the two is the ceiling.
        self.bandwidth = max(self.read, self.copy)
        a, b = (torch.randn(product, product, device=clock.device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        self.flops = 2 * product**3 / clock.seconds(lambda: torch.mm(a, b, out=out), is_cold=False)

    def __str__(self) -> str:
        return (
            f"ceilings now: read {self.read / 1e9:,.0f} GB/s, copy {self.copy / 1e9:,.0f} GB/s, "
            f"bf16 {self.flops / 1e12:,.0f} TFLOP/s"
        )
