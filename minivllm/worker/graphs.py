"""Steps replayed as a whole: from native calls, of any size, on a CPU; decodes, as captured graphs, on a GPU.

Owns when a recording or a capture serves in a step's place. On a CPU a part of a step is recorded once, for all numbers
of tokens and requests (`ops/recording.py`): it is right as long as all that it reads and writes lies where it lay, and
it is trusted once it gave an eager step's bits. A GPU's graphs are of one shape each, and so by key: where every tensor
lies that the step reads. What either computes is the eager step's bits, for it makes the same calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import numpy as np
import torch

from minivllm.logger import init_logger
from minivllm.ops.recording import Outputs, SizedRecording, Sizes, record_for_sizes
from minivllm.platforms.platform import Graphs

logger = init_logger(__name__)

Step = Callable[[], Outputs]


class RecordedStep:
    """A part of a step that is replayed, whatever its size; or is what it was, if it cannot be."""

    def __init__(
        self, name: str, step: Callable[[Sizes], Outputs], most: Sizes, after: SizedRecording | None = None
    ) -> None:
        """As in `record_for_sizes`, done here; what `step` reads stays where it is from now on."""
        self._name = name
        self._recording: SizedRecording | None = None
        self._is_trusted = False
        found = record_for_sizes(step, most, after)
        if isinstance(found, str):
            self._refuse(found)
        else:
            self._recording = found

    @property
    def recording(self) -> SizedRecording | None:
        """None: it was refused, and every step is an eager one."""
        return self._recording

    @property
    def is_trusted(self) -> bool:
        """Whether it has given an eager step's bits."""
        return self._is_trusted

    def run(self, sizes: Sizes, step: Step) -> Outputs:
        """What `step()` gives, what comes before included. The tensors may be ones that the next call writes to.

        sizes: of `step`, none above the most.
        """
        if self._recording is None:
            return step()
        return self._recording.replay(sizes) if self._is_trusted else self._check(self._recording, sizes, step)

    def _check(self, recording: SizedRecording, sizes: Sizes, step: Step) -> Outputs:
        """The eager step's outputs, and whether a replay before it gives the same bits."""
        try:
            replayed = [output.clone() for output in recording.replay(sizes)]
        except (IndexError, ValueError) as error:  # of a native call, if the step does not raise it too
            replayed = []
            logger.debug("%s, replayed: %s", self._name, error)
        outputs = step()
        self._is_trusted = len(replayed) == len(outputs) and all(map(_are_same, replayed, outputs))
        if not self._is_trusted:
            self._refuse("a replay gave other bits than the step itself")
        return outputs

    def _refuse(self, why: str) -> None:
        logger.debug("%s is not replayed: %s", self._name, why)
        self._recording = None


def _are_same(ours: torch.Tensor, its: torch.Tensor) -> bool:
    return ours.shape == its.shape and torch.equal(ours.view(torch.uint8), its.view(torch.uint8))


class CapturedGraphs:
    """What the device captured, by key; a step is captured when its shape is first met, or before the first request.

    A capture takes some tenths of a second, once a shape (`capture_shapes.py`) and kind of sampling. All leave their
    results in the same places: what a capture holds on to, no other can use, and logits are large.
    """

    def __init__(self, graphs: Graphs, max_rows: int, most: int) -> None:
        """max_rows: the most that a step's results have; most: captures, for each takes memory of the device's."""
        self._captures = graphs
        self._max_rows, self._most = max_rows, most
        self._places: list[torch.Tensor] = []
        self._graphs: dict[Hashable, tuple[Callable[[], None], tuple[torch.Tensor, ...]]] = {}
        self._is_full = False

    @torch.inference_mode()
    def run(self, key: Hashable | None, step: Step) -> tuple[torch.Tensor, ...]:
        """What `step()` gives. The tensors may be ones that the next call writes to.

        key: of everything `step` reads but weights and the cache, see `key_of`; None for a step not to be captured.
        What the step reads has been put where it lies by work given to the device before.
        """
        if key is None:
            return step()
        if key not in self._graphs:
            if len(self._graphs) >= self._most:
                self._say_full()
                return step()
            self.capture(key, step)
        replay, outputs = self._graphs[key]
        replay()
        return outputs

    @torch.inference_mode()
    def capture(self, key: Hashable, step: Step) -> None:
        """Have the step under this key, and run nothing (but what a capture must)."""
        self._graphs[key] = self._captures.capture(partial(self._into_places, step))
        logger.debug("captured decode step number %d of %d at most", len(self._graphs), self._most)

    def clear(self) -> None:
        """Forget all: what they read lies elsewhere from now on."""
        self._graphs.clear()
        self._places.clear()
        self._captures.forget()

    def _say_full(self) -> None:
        if not self._is_full:
            logger.warning(
                "%d decode steps are captured, which is what there is memory for; those of other shapes run without a "
                "graph from now on. Fewer --cudagraph-capture-sizes would leave room for each",
                self._most,
            )
            self._is_full = True

    def _into_places(self, step: Step) -> tuple[torch.Tensor, ...]:
        """What `step()` gives, one row a request each, copied. The first call, which is no capture, makes them."""
        results = step()
        for result in results[len(self._places) :]:
            self._places.append(result.new_empty(self._max_rows, *result.shape[1:]))
        return tuple(place[: len(result)].copy_(result) for place, result in zip(self._places, results))


def key_of(*values: Any) -> Hashable | None:
    """Where and how everything in these values lies; None if there is something whose place is not known."""
    parts: list[Hashable] = []
    return tuple(parts) if all(_add_to(parts, value) for value in values) else None


def _add_to(parts: list[Hashable], value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        parts.append((value.data_ptr(), value.shape, value.stride()))
    elif isinstance(value, np.ndarray):
        parts.append((value.ctypes.data, value.shape, value.strides))
    elif value is None or isinstance(value, (int, float, str)):
        parts.append(value)
    elif isinstance(value, (list, tuple)):
        parts.append(len(value))
        return all(_add_to(parts, item) for item in value)
    elif dataclasses.is_dataclass(value):
        return all(_add_to(parts, getattr(value, name)) for name in value.__dataclass_fields__)
    else:
        return False
    return True
