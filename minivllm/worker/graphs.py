"""Steps of a shape met before, replayed as a whole: from native calls on a CPU; decodes, as captured graphs, on a GPU.

Owns when a step is recorded, checked and replayed, and how much memory recordings keep. Both classes have one contract,
`run(key, step)`. A replay is right when every tensor the step reads lies where it lay when it was recorded, in the same
shape: that is the key. What it computes is the eager step's bits, for it makes the same calls; a recording of native
calls is trusted once it gave them on another step's inputs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import numpy as np
import torch

from minivllm.logger import init_logger
from minivllm.ops.recording import Recording, recording
from minivllm.platforms.platform import Graphs

logger = init_logger(__name__)

_TIMES_MET = 3  # batches of a size that passes by are not worth recording
_MOST_BYTES = 96 << 20  # kept by all recordings
_MOST_KEYS = 4096  # remembered as met
_IN_USE = 256  # steps: what was replayed within so many is not given up
_PATIENCE = 16  # how often a step for which there was no room is met before it is tried again

Step = Callable[[], tuple[torch.Tensor, ...]]


@dataclasses.dataclass
class _Graph:
    recording: Recording
    outputs: tuple[torch.Tensor, ...]  # where every replay leaves them
    last_run: int  # when it was last wanted, in steps
    is_trusted: bool = False


class StepGraphs:
    """Recordings by key, the least recently used given up first, and none that is in use.

    Recording and checking cost what several replays save: of more shapes than there is room for, some are
    replayed and the others are not, instead of all of them recorded in turns.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES, *, times_met: int = _TIMES_MET) -> None:
        """times_met: how often a step has been met before it is worth recording."""
        self._most_bytes, self._times_met = most_bytes, times_met
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._num_bytes = self._num_runs = 0
        self._met: Counter[Hashable] = Counter()
        self._refused = False

    def run(self, key: Hashable | None, step: Step) -> tuple[torch.Tensor, ...]:
        """What `step()` gives. The tensors may be ones that the next call writes to.

        key: of everything `step` reads but weights and the cache, see `key_of`; None for a step not to be recorded.
        """
        if key is None or self._refused:
            return step()
        self._num_runs += 1
        graph = self._graphs.get(key)
        if graph is None:
            return self._meet(key, step)
        self._graphs.move_to_end(key)
        graph.last_run = self._num_runs
        graph.recording.replay()
        if not graph.is_trusted:
            return self._check(graph, step)
        return graph.outputs

    def _meet(self, key: Hashable, step: Step) -> tuple[torch.Tensor, ...]:
        if len(self._met) >= _MOST_KEYS:
            self._met.clear()
        self._met[key] += 1
        if self._met[key] <= self._times_met:
            return step()
        with recording() as taken:
            outputs = step()
        if taken.unusable is not None:
            self._refuse(taken.unusable)
        elif taken.nbytes > self._most_bytes // 2:
            self._met[key] = -(1 << 30)  # too large ever to be kept
        elif not self._make_room(taken.nbytes):
            self._met[key] = -_PATIENCE
        else:
            self._graphs[key] = _Graph(taken, outputs, self._num_runs)
            self._num_bytes += taken.nbytes
        return outputs

    def _make_room(self, num_bytes: int) -> bool:
        """Give up what is out of use, as far as it takes; whether there is so much room then."""
        while self._num_bytes + num_bytes > self._most_bytes:
            key, oldest = next(iter(self._graphs.items()))
            if self._num_runs - oldest.last_run < _IN_USE:
                return False
            self._num_bytes -= self._graphs.pop(key).recording.nbytes
            self._met[key] = 0
        return True

    def _check(self, graph: _Graph, step: Step) -> tuple[torch.Tensor, ...]:
        """The eager step's outputs, and whether the replay before it gave the same bits."""
        replayed = [output.clone() for output in graph.outputs]
        outputs = step()
        pairs = zip(replayed, outputs, strict=True)
        graph.is_trusted = all(torch.equal(ours.view(torch.uint8), its.view(torch.uint8)) for ours, its in pairs)
        if not graph.is_trusted:
            self._refuse("a replayed step gave other bits than the step itself")
        return outputs

    def _refuse(self, why: str) -> None:
        logger.debug("steps are not replayed: %s", why)
        self._refused = True
        self._graphs.clear()


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
        """As `StepGraphs.run`. What the step reads has been put where it lies by work given to the device before."""
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
