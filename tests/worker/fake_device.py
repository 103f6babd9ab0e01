"""A device that is none: tensors apart from the host's, events never early, graphs that know no later step.

What the runner does for a GPU, it does here: copies through pinned memory, padded decodes, tokens that stay there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from minivllm.attention.backend import StepInputs
from minivllm.attention.backends.cpu_native import CpuNativeBackend, Metadata
from minivllm.ops.op import Op, OpSpec
from minivllm.platforms.cpu import CpuPlatform
from minivllm.platforms.platform import DevicePlatform, Graphs


class HostRead(AssertionError):
    """The host asked for what is on the device, and would wait for it."""


_WAITS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "unique", "masked_select", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__",
}  # fmt: skip
_COPIES: deque[Callable[[], None]] = deque()  # to the host, under way
_num_copied = 0  # of all there have been


class OnDevice(torch.Tensor):
    """A tensor that the host may not read, and what is computed from it is another. It comes to the host by copies into
    other tensors that are made when an event is waited for, and give garbage before."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _WAITS or (name == "to" and any(isinstance(to, (str, torch.device)) for to in args[1:])):
            raise HostRead(f"{name} waits for the device")
        if name in ("__getitem__", "__setitem__", "index_put_") and _picks_by_value(args[1]):
            raise HostRead(f"{name} by a mask, or by what the host has, waits for the device")
        if name == "copy_" and not isinstance(args[0], OnDevice):
            if not kwargs.get("non_blocking"):
                raise HostRead("copy_ waits for the device unless it is non_blocking")
            place, value = args[0].numpy(), args[1].as_subclass(torch.Tensor).clone().numpy()
            place.fill(77)
            _COPIES.append(lambda: np.copyto(place, value))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


def _picks_by_value(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, (np.ndarray, list))
        or (isinstance(part, torch.Tensor) and (part.dtype == torch.bool or not isinstance(part, OnDevice)))
        for part in parts
    )


def on_device(value: Any) -> Any:
    """The same, unreadable; tuples with all that is in them."""
    if isinstance(value, tuple):
        return tuple(map(on_device, value))
    return value.as_subclass(OnDevice) if isinstance(value, torch.Tensor) else value


def as_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """As it is on a device: it reads its arguments there, and nobody else sees what it gives."""

    def launch(*args: Any) -> Any:
        return on_device(
            function(*(x.as_subclass(torch.Tensor) if isinstance(x, OnDevice) else x for x in args))
        )

    return launch


ON_LOGITS = {
    "gumbel_argmax", "top_k_top_p_min_p", "apply_bitmask", "token_logprobs", "likeliest_tokens", "apply_penalties",
    "count_tokens",
}  # fmt: skip


def strict_ops(select: Callable[[Op, OpSpec], Any]) -> Callable[[Op, OpSpec], Any]:
    """`Op.select`, whose choices for logits are kernels where a GPU has a kernel, else what torch does there."""

    def strict(op: Op, spec: OpSpec) -> Any:
        if op.name not in ON_LOGITS:
            return select(op, spec)
        has_kernel = any(isinstance(each.fn, str) for each in op.implementations)
        return as_kernel(select(op, spec)) if has_kernel else op.implementations[-1].load()

    return strict


def recording_ops(select: Callable[[Op, OpSpec], Any], launched: set[str]) -> Callable[[Op, OpSpec], Any]:
    """`Op.select`, whose choices enter their op's name into `launched` when they are called."""

    def record(op: Op, spec: OpSpec) -> Any:
        chosen = select(op, spec)
        if isinstance(chosen, type):  # of a layer's own, which the largest step runs
            return chosen

        def launch(*args: Any, **options: Any) -> Any:
            launched.add(op.name)
            return chosen(*args, **options)

        return launch

    return record


class FakeEvent:
    """Never there before it is waited for, and then with all copies given to the device before it."""

    def __init__(self) -> None:
        self._num_copies = _num_copied + len(_COPIES)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        global _num_copied
        while _COPIES and _num_copied < self._num_copies:
            _COPIES.popleft()()
            _num_copied += 1


class FakeGraphs(Graphs):
    """A replay runs the step as it was captured, and leaves its results where the capture's lie."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []  # of each capture
        self.num_replays = 0
        self.generation = 0  # how often all were forgotten: captures of an earlier one may not be replayed

    def capture(self, step: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[Callable[[], None], Any]:
        results = step()
        self.num_rows.append(len(results[0]))
        generation = self.generation

        def replay() -> None:
            assert generation == self.generation, "a graph that was forgotten is replayed"
            self.num_replays += 1
            for place, value in zip(results, step()):
                place.copy_(value)

        for place in results:
            place.zero_()  # a capture computes nothing
        return replay, results

    def forget(self) -> None:
        self.generation += 1


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

    def _attend(self, q, kv_cache, metadata, options, write=None):
        step = replace(metadata.step, seq_lens=metadata.step.seq_lens.clamp_min(1))
        return super()._attend(q, kv_cache, Metadata(step, None), options, write)
