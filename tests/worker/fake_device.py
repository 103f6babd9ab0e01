"""A device that is none: tensors apart from the host's, events never early, graphs that know no later step.

What the runner does for a GPU, it does here: copies through pinned memory, padded decodes, tokens that stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from minivllm.attention.backend import StepInputs
from minivllm.attention.backends.cpu_native import CpuNativeBackend, Metadata
from minivllm.platforms.cpu import CpuPlatform
from minivllm.platforms.platform import DevicePlatform, Graphs


class FakeEvent:
    """Never there before it is waited for."""

    def __init__(self) -> None:
        self.is_waited_for = False

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.is_waited_for = True


class FakeGraphs(Graphs):
    """A replay runs the step as it was captured, and leaves its results where the capture's lie."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []  # of each capture
        self.num_replays = 0
        self._generation = 0  # captures of an earlier one may not be replayed

    def capture(self, step: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[Callable[[], None], Any]:
        results = step()
        self.num_rows.append(len(results[0]))
        generation = self._generation

        def replay() -> None:
            assert generation == self._generation, "a graph that was forgotten is replayed"
            self.num_replays += 1
            for place, value in zip(results, step()):
                place.copy_(value)

        for place in results:
            place.zero_()  # a capture computes nothing
        return replay, results

    def forget(self) -> None:
        self._generation += 1


class FakeDevice(CpuPlatform, DevicePlatform):
    name = "fake"
    is_host = False
    block_size_multiple = 16
    default_memory_utilization = 0.5

    def __init__(self, free_bytes: int = 1 << 30) -> None:
        super().__init__()
        self.graphs = FakeGraphs()
        self.num_events = 0
        self._free_bytes = free_bytes

    def memory_available_bytes(self) -> int:
        return self._free_bytes

    def record_event(self) -> FakeEvent:
        self.num_events += 1
        return FakeEvent()

    def new_pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def release_unused(self) -> None:
        pass

    def give_back(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        take_back = DevicePlatform.give_back(self, tensors)

        def and_spoil() -> None:
            take_back()
            for tensor in tensors:
                tensor.view(torch.uint8).fill_(0xFF)  # NaN, of whatever type

        return and_spoil

    def peak_bytes_of(self, step: Callable[[], object]) -> int:
        step()
        return 5 << 20

    def kept_bytes_of(self, work: Callable[[], object]) -> int:
        work()
        return 1 << 20


class FakeDeviceBackend(CpuNativeBackend):
    """The CPU's attention, which learns nothing of a step before it runs, and lets rows of no request see one token."""

    def build_metadata(self, step: StepInputs) -> Metadata:
        return Metadata(step, None)

    def forward(self, q, k, v, kv_cache, metadata, *, options):
        step = replace(metadata.step, seq_lens=metadata.step.seq_lens.clamp_min(1))
        return super().forward(q, k, v, kv_cache, Metadata(step, None), options=options)
