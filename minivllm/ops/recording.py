"""The native calls of a stretch of code, written down with their arguments (csrc/tape.h) to be made again as one.

Arguments are addresses: a recording keeps alive every tensor that torch made, or made a view of, while it was taken,
and whoever replays it sees to it that all other memory lies where it lay. What nobody looks at any more is given to the
next tensor of its size, so that a step keeps about a layer's memory, and it stays in the caches. Memory that an op
keeps between calls and may replace is kept alive by taking a view of it in each call. When a replay is right is for
`worker/graphs.py` to know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minivllm.utils.native import lib

_aten = torch.ops.aten
_RESERVES = {_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty}


class Recording:
    """Calls in order, on a native tape. `unusable` says why they are not all that happened."""

    def __init__(self) -> None:
        self.tape = None if lib is None else lib.Tape()
        self.unusable = None if lib is not None else "there are no native calls to record"
        self._kept: dict[int, torch.UntypedStorage] = {}  # by address
        self._ours: dict[int, list[torch.UntypedStorage]] = {}  # those that were made for this, by size

    @property
    def nbytes(self) -> int:
        """Of the memory that was made for it. What an op keeps as well would be there without it."""
        return sum(storage.nbytes() for known in self._ours.values() for storage in known)

    def replay(self) -> None:
        """Make the calls again: one call of the extension, without Python's lock."""
        self.tape.replay()

    def keep(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._kept[storage.data_ptr()] = storage

    def reserve(self, fresh: torch.Tensor) -> torch.Tensor:
        """A tensor like this one, which is new: in memory of ours that was let go of, or in its own."""
        storage = fresh.untyped_storage()
        known = self._ours.setdefault(storage.nbytes(), [])
        for other in known:
            if torch._C._storage_Use_Count(other._cdata) == 1:  # this list's
                return fresh.set_(other, 0, fresh.shape, fresh.stride())
        known.append(storage)
        self.keep([fresh])
        return fresh


class _Watch(TorchDispatchMode):
    """Keeps what torch makes, and notices when it computes: a replay would leave that out."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by torch, which would import its compiler in mid-step (1.5 s) only to keep it out of here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _RESERVES:
            return self._recording.reserve(result)
        made = _tensors(result)
        self._recording.keep(made)
        if not _is_view(func, made, _tensors(args)):
            self._recording.unusable = f"torch computes {func}"
        return result


def _is_view(func: Any, made: list[torch.Tensor], given: list[torch.Tensor]) -> bool:
    """Whether an operation only looked at memory another way."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    return bool(made) and not func._schema.is_mutable and all(t.untyped_storage().data_ptr() in known for t in made)


def _tensors(value: Any) -> list[torch.Tensor]:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in items if isinstance(item, torch.Tensor)]


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Write down every native call that this thread makes inside, while no other makes any."""
    taken = Recording()
    if taken.tape is None:
        yield taken
        return
    places = list(native_functions())
    try:
        for owner, name, function in places:
            setattr(owner, name, _checked(function, taken))
        taken.tape.start()
        with _Watch(taken):
            yield taken
    finally:
        taken.tape.stop()
        for owner, name, function in places:
            setattr(owner, name, function)


def native_functions() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """The extension's functions and its classes' methods: where they are found, and by which name."""
    owners = [lib, *(value for value in vars(lib).values() if isinstance(value, type) and value is not lib.Tape)]
    for owner in owners:
        for name, value in vars(owner).items():
            if callable(value) and not isinstance(value, type) and not name.startswith("__"):
                yield owner, name, value


def _checked(function: Callable[..., Any], taken: Recording) -> Callable[..., Any]:
    """The function, noticing whether a call of it is on the tape."""

    def call(*args: Any) -> Any:
        before = len(taken.tape)
        result = function(*args)
        if len(taken.tape) == before:
            taken.unusable = f"{function.__name__} cannot be recorded: csrc/ registers it without `recordable`"
        return result

    return call
