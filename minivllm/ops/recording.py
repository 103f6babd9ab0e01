"""The native calls of a stretch of code, written down with their arguments (csrc/tape.h) to be made again as one.

Arguments are addresses: a recording keeps alive every tensor that torch made, or made a view of, while it was taken,
and whoever replays it sees to it that all other memory lies where it lay: an op keeps none of its own that it may
replace. What nobody looks at any more is given to the next tensor of its size, so that a step keeps about a layer's
memory, and it stays in the caches. When a replay is right is for `worker/graphs.py` to know.

Code whose tensors have a row for each of so many things (tokens, requests) is recorded for all numbers of them
(`record_for_sizes`): what it makes of fewer rows is the beginning of the same memory, so that nothing differs between
two sizes but integers that are multiples of them. It is recorded at three, without making the calls, and compared.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from operator import gt
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minivllm.ops import native
from minivllm.utils.native import lib

_aten = torch.ops.aten
_RESERVES = {_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty}
_ADVICE = {"advise_huge_pages"}  # native calls that change nothing
_one_at_a_time = threading.Lock()  # the extension, whose functions a recording replaces, is the process's


class Recording:
    """Calls in order, on a native tape. `unusable` says why they are not all that happened."""

    def __init__(
        self, *, is_dry: bool = False, like: Recording | None = None, after: Recording | None = None
    ) -> None:
        """is_dry: calls are not made; like: one of the same code for more rows, whose memory this is to use; after: one
        that is replayed first, each time."""
        self.tape = None if lib is None else lib.Tape(is_dry, None if after is None else after.tape)
        self._after = after
        self.unusable = None if lib is not None else "there are no native calls to record"
        self._kept: dict[int, torch.UntypedStorage] = {}  # by address
        self._ours: dict[int, list[_Place]] = {}  # made for this, by size
        self._reserved: list[_Place] = []  # one for each tensor that was asked for
        self._given = None if like is None else iter(like._reserved)

    @property
    def nbytes(self) -> int:
        """Of the memory that was made for it. What it was only shown would be there without it."""
        return sum(place.memory.nbytes for known in self._ours.values() for place in known)

    def replay(self, sizes: Sequence[int] = ()) -> None:
        """Make the calls again: one call of the extension, without Python's lock."""
        self.tape.replay(sizes)

    def keep(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._kept[storage.data_ptr()] = storage

    def keep_what(self, other: Recording) -> None:
        """Keep alive what the other one does as well."""
        self._kept |= other._kept

    def reserve(self, fresh: torch.Tensor) -> torch.Tensor:
        """A tensor like this one, which is new, in memory of ours: some that was let go of, or more."""
        nbytes = fresh.untyped_storage().nbytes()
        place = self._idle_place(nbytes) if self._given is None else next(self._given, None)
        if place is None or place.memory.nbytes < nbytes:
            self.unusable = f"{nbytes} bytes are wanted that are not at the largest size"
            return fresh
        self._reserved.append(place)
        return fresh.set_(place.storage, place.begin // fresh.element_size(), fresh.shape, fresh.stride())

    def _idle_place(self, nbytes: int) -> _Place:
        known = self._ours.setdefault(nbytes, [])
        for place in known:
            if place.is_idle:
                return place
        known.append(_Place(nbytes))
        return known[-1]


class _Place:
    """Memory for one tensor at a time, on huge pages if it is large: what is read and written once a layer is not
    always in the caches."""

    def __init__(self, nbytes: int) -> None:
        self.memory = native.huge_pages(nbytes)
        self.begin, self.storage = self.memory.storage_offset(), self.memory.untyped_storage()
        self._num_own_uses = self._num_uses

    @property
    def _num_uses(self) -> int:
        return torch._C._storage_Use_Count(self.storage._cdata)

    @property
    def is_idle(self) -> bool:
        """Whether nobody looks at it."""
        return self._num_uses == self._num_own_uses


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


Outputs = tuple[torch.Tensor, ...]
Sizes = tuple[int, ...]


class SizedRecording:
    """A recording that is replayed for other sizes than it was taken at."""

    def __init__(self, recording: Recording, most: Sizes, outputs: Outputs, size_of_output: list[int]) -> None:
        """outputs: of the largest sizes; size_of_output: which one is their number of rows."""
        self.recording, self.most, self.outputs = recording, most, outputs
        self._size_of_output = size_of_output
        self._last: tuple[Sizes, Outputs] = (most, outputs)

    @property
    def nbytes(self) -> int:
        return self.recording.nbytes

    def replay(self, sizes: Sizes) -> Outputs:
        """Make the calls for these sizes. The outputs are views of the same memory each time, and where the sizes are
        those of the last time, the same tensors.

        Raises:
            ValueError: a size is above the most.
        """
        if self._last[0] != sizes:
            if any(map(gt, sizes, self.most)):
                raise ValueError(f"a step of sizes {sizes} was recorded for {self.most} at most")
            rows = zip(self.outputs, self._size_of_output)
            self._last = sizes, tuple(output[: sizes[size]] for output, size in rows)
        self.recording.replay(sizes)
        return self._last[1]


def record_for_sizes(
    step: Callable[[Sizes], Outputs], most: Sizes, after: SizedRecording | None = None
) -> SizedRecording | str:
    """The native calls of `step(sizes)`, for all sizes up to `most`; or why there is no such recording.

    `step` is called three times, and its native calls are not made: what it is given may hold anything. Each of its
    outputs has as many rows as one of the sizes says. after: of the same sizes, and replayed before it.
    """
    try:
        sizes = [most, _fewer(most), _about_as_many(most)]
        taken: list[Recording] = []
        outputs: list[Outputs] = []
        for each in sizes:
            like, before = (taken[0], None) if taken else (None, after and after.recording)
            with recording(is_dry=True, like=like, after=before) as one:
                outputs.append(step(each))
            if one.unusable is not None:
                return one.unusable
            taken.append(one)
        largest, *others = taken
        largest.tape.follow_sizes([other.tape for other in others], most, sizes[1:])
        size_of_output = [_size_of(places, sizes) for places in zip(*outputs, strict=True)]
    except (IndexError, RuntimeError, ValueError) as error:  # what was not computed may be no number of a row
        return str(error)
    for other in others:
        largest.keep_what(other)
    return SizedRecording(largest, most, outputs[0], size_of_output)


def _fewer(most: Sizes) -> Sizes:
    """The least sizes that are each another part of the most."""
    fewer: list[int] = []
    seen: set[Fraction] = {Fraction(1)}
    for size in most:
        least = next((n for n in range(1, size) if Fraction(size, n) not in seen), None)
        if least is None:
            raise ValueError(f"sizes of at most {most} cannot be told apart; allow more rows")
        seen.add(Fraction(size, least))
        fewer.append(least)
    return tuple(fewer)


def _about_as_many(most: Sizes) -> Sizes:
    """Sizes near each other, the later the larger: what is one of them at the most and at the least only by chance, as
    the larger of two is, is not that one here."""
    return tuple(min(size, min(most) // 2 + i) for i, size in enumerate(most))


def _size_of(output: tuple[torch.Tensor, ...], sizes: list[Sizes]) -> int:
    """Which size the number of rows of an output is, by what it is at each of some sizes."""
    rows, known = tuple(map(len, output)), list(zip(*sizes))
    if len({each.data_ptr() for each in output}) > 1 or rows not in known:
        raise ValueError(f"an output is {' and '.join(str(list(each.shape)) for each in output)} at several sizes")
    return known.index(rows)


@contextlib.contextmanager
def recording(
    *, is_dry: bool = False, like: Recording | None = None, after: Recording | None = None
) -> Iterator[Recording]:
    """Write down every native call that this thread makes inside, as `Recording` says."""
    taken = Recording(is_dry=is_dry, like=like, after=after)
    if taken.tape is None:
        yield taken
        return
    with _one_at_a_time:
        places = [place for place in native_functions() if place[1] not in _ADVICE]
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
    """The function, noticing whether a call of it is on the tape, which another thread's are not to be."""
    thread = threading.get_ident()

    def call(*args: Any) -> Any:
        if threading.get_ident() != thread:
            return function(*args)
        before = len(taken.tape)
        result = function(*args)
        if len(taken.tape) == before:
            taken.unusable = f"{function.__name__} cannot be recorded: csrc/ registers it without `recordable`"
        return result

    return call
