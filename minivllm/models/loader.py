"""From a checkpoint's files to a model's memory: everything is checked first, then each byte is read once.

Owns what a checkpoint must look like as a whole (files, index, one tensor for each parameter). The format is
`safetensors.py`'s, and how a parameter takes its tensor in is the layer's.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from minivllm.exceptions import ModelFilesError
from minivllm.layers.weight import Weight
from minivllm.models.safetensors import TensorEntry, float_dtypes, read_header, read_rows
from minivllm.ops.largest import largest_magnitude
from minivllm.ops.op import OpSpec
from minivllm.platforms.platform import DevicePlatform, Event, Platform

_PIECE_BYTES = 4 << 20  # read at once: what is checked and packed then comes from a processor's cache
INDEX = "model.safetensors.index.json"
_DUMMY_ROWS_ELEMENTS = 1 << 22  # random numbers made at once


class Model(Protocol):
    """What the loader needs of a model."""

    def weights(self) -> Iterator[Weight]: ...

    def scales(self) -> Iterator[Weight]: ...

    def is_redundant(self, name: str) -> bool: ...


@dataclass(frozen=True)
class LoadPlan:
    """Each expected weight with the tensor that fills it. `make_plan` has checked that they fit."""

    steps: list[tuple[Weight, TensorEntry]]

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return sum(entry.num_bytes for _, entry in self.steps)


# Files -----------------------------------------------------------------------


def check_files(directory: Path) -> list[TensorEntry]:
    """Every tensor of the checkpoint in `directory`. Reads headers only.

    Raises:
        ModelFilesError: there are no safetensors files, one is missing, damaged or cut short, or a tensor is
            not where the index says.
    """
    index = _read_index(directory)
    names = sorted(set(index.values())) if index else _files_without_index(directory)
    entries: dict[str, TensorEntry] = {}
    for name in names:
        path = directory / name
        if not path.is_file():
            raise ModelFilesError(f"{path} is missing, though {INDEX} lists it; download it again")
        for entry in read_header(path):
            if entry.name in entries:
                raise ModelFilesError(
                    f"tensor {entry.name} is both in {entries[entry.name].path} and in {path}; remove the file "
                    "that does not belong to this checkpoint"
                )
            entries[entry.name] = entry
    _check_index(directory, index, entries)
    return list(entries.values())


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name; empty where there is no index."""
    path = directory / INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        is_map = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    except OSError as error:
        raise ModelFilesError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        is_map = False
    if not is_map or not weight_map:
        raise ModelFilesError(f"{path} holds no weight_map of tensor names to files; download it again")
    outside = next((name for name in weight_map.values() if Path(name).name != name), None)
    if outside is not None:
        raise ModelFilesError(f"{path} names the file {outside!r}, which is not in its own directory")
    return weight_map


def _files_without_index(directory: Path) -> list[str]:
    single = directory / "model.safetensors"
    if single.exists():
        return [single.name]
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        others = sorted(path.name for path in [*directory.glob("*.bin"), *directory.glob("*.pt*")])
        hint = (
            f" ({others[0]} is a pickle, which could run code; convert it to safetensors)" if others else ""
        )
        raise ModelFilesError(f"{directory} holds no *.safetensors files{hint}")
    return names


def _check_index(directory: Path, index: dict[str, str], entries: dict[str, TensorEntry]) -> None:
    for name, file_name in index.items():
        entry = entries.get(name)
        if entry is None or entry.path.name != file_name:
            found = f"; it is in {entry.path.name}" if entry else ""
            raise ModelFilesError(
                f"tensor {name} is not in {directory / file_name}, though {INDEX} says so{found}; "
                "download both again"
            )


# Plan ------------------------------------------------------------------------


def make_plan(model: Model, entries: Iterable[TensorEntry]) -> LoadPlan:
    """Pair every weight the model expects with its tensor, before any weight is read.

    Raises:
        ModelFilesError: a tensor is missing, left over, of another shape or of a type that cannot be read.
    """
    found = {entry.name: entry for entry in entries}
    expected = {weight.name: weight for weight in model.weights()}
    expected |= {scale.name: scale for scale in model.scales() if scale.name in found}
    _refuse(
        [name for name in expected if name not in found],
        lambda name: (
            f"tensor {name} of shape {expected[name].shape} is missing from the checkpoint; "
            "is config.json of another model, or a shard lost?"
        ),
    )
    _refuse(
        [name for name in found if name not in expected and not model.is_redundant(name)],
        lambda name: (
            f"{found[name].path}: tensor {name} is left over: this architecture has no place for it; "
            "is config.json of another model?"
        ),
    )
    _refuse(
        [name for name, weight in expected.items() if not _has_shape(found[name], weight)],
        lambda name: (
            f"{found[name].path}: tensor {name} has shape {found[name].shape}; config.json asks for "
            f"{expected[name].shape}"
        ),
    )
    _refuse(
        [name for name in expected if not found[name].is_float],
        lambda name: (
            f"{found[name].path}: tensor {name} is of type {found[name].dtype}; weights are read from "
            f"{', '.join(float_dtypes())}, quantized ones not yet"
        ),
    )
    return LoadPlan([(weight, found[name]) for name, weight in expected.items()])


def _has_shape(entry: TensorEntry, weight: Weight) -> bool:
    is_number = weight.shape == () and entry.shape == (1,)
    return entry.shape == weight.shape or is_number


def _refuse(names: list[str], message: Callable[[str], str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more such)" if len(names) > 1 else ""
        raise ModelFilesError(message(names[0]) + more)


# Load ------------------------------------------------------------------------


def load_weights(
    plan: LoadPlan, dtype: torch.dtype, platform: Platform | None = None, *, show_progress: bool = True
) -> None:
    """Read each tensor into its place, converted to `dtype` (which the model was built for).

    platform: where the places are; None for host memory.

    Raises:
        ModelFilesError: a tensor holds a NaN, an infinity, or a number that `dtype` cannot hold.
    """
    by_file: dict[Path, dict[TensorEntry, Weight]] = defaultdict(dict)
    for weight, entry in plan.steps:
        by_file[entry.path][entry] = weight
    stream = PinnedStream(platform) if isinstance(platform, DevicePlatform) else None
    piece_bytes = _PIECE_BYTES if stream is None else stream.piece_bytes
    with tqdm(
        total=plan.num_bytes, desc="Loading weights", unit="B", unit_scale=True, disable=not show_progress
    ) as bar:
        for path, weights in by_file.items():
            entries = sorted(weights, key=lambda entry: entry.begin)  # as the disk has them
            with contextlib.closing(read_rows(path, entries, piece_bytes)) as pieces:
                for entry, start, rows in pieces:
                    if stream is None or not rows.dim():
                        largest = largest_magnitude.select(OpSpec("cpu", rows.dtype))(rows)
                        _check_numbers(entry, largest, dtype)
                        weights[entry].load_rows(start, rows)
                    else:
                        _check_numbers(entry, stream.load(weights[entry], start, rows), dtype)
                    bar.update(rows.nbytes)


def _check_numbers(entry: TensorEntry, largest: float, dtype: torch.dtype) -> None:
    """largest: the magnitude among some of the tensor's numbers; NaN if one is."""
    if not largest < float("inf"):
        raise ModelFilesError(
            f"{entry.path}: tensor {entry.name} holds a NaN or an infinity; the file is damaged, download it again"
        )
    if largest > torch.finfo(dtype).max:
        raise ModelFilesError(
            f"{entry.path}: tensor {entry.name} holds {largest:g}, too large for {dtype}; try --dtype bfloat16"
        )


class PinnedStream:
    """Rows on their way to a device: put into pinned memory by turns, fetched from there while the next are read."""

    piece_bytes = 64 << 20  # put there at once; a row that is larger is not

    def __init__(self, platform: DevicePlatform) -> None:
        self._platform = platform
        self._places = [platform.new_pinned((self.piece_bytes,), torch.uint8) for _ in range(2)]
        self._fetched: list[Event | None] = [None, None]
        self._turn = 0

    def load(self, weight: Weight, start: int, rows: torch.Tensor) -> float:
        """Give the weight its rows from `start` on; the largest magnitude among them. `rows` may change then."""
        rows = self._fetch(rows)
        weight.load_rows(start, rows)
        return largest_magnitude.select(OpSpec(self._platform.device, rows.dtype))(rows)

    def _fetch(self, rows: torch.Tensor) -> torch.Tensor:
        """The same, on the device."""
        if rows.nbytes > self.piece_bytes:
            return rows.to(self._platform.device)
        self._turn = 1 - self._turn
        fetched = self._fetched[self._turn]
        if fetched is not None:
            fetched.synchronize()
        place = self._places[self._turn][: rows.nbytes].view(rows.dtype).view(rows.shape)
        place.copy_(rows)
        there = torch.empty(rows.shape, dtype=rows.dtype, device=self._platform.device)
        there.copy_(place, non_blocking=True)
        self._fetched[self._turn] = self._platform.record_event()
        return there


def load_dummy(model: Model, dtype: torch.dtype, seed: int, scale: float, *, device: str = "cpu") -> None:
    """Fill the model with seeded random weights, normal with deviation `scale`; norms around 1.

    They are made on the device that holds them. A tensor's values depend on (seed, name, shape) and the kind of device.
    """
    for weight in model.weights():
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {weight.name}".encode()))
        row_elements = torch.Size(weight.shape[1:]).numel()
        step = max(1, _DUMMY_ROWS_ELEMENTS // row_elements)
        mean = 1.0 if weight.name.endswith("norm.weight") else 0.0
        for start in range(0, weight.shape[0], step):
            num_rows = min(step, weight.shape[0] - start)
            rows = torch.randn((num_rows, *weight.shape[1:]), generator=generator, device=device)
            weight.load_rows(start, rows.mul_(scale).add_(mean).to(dtype))
