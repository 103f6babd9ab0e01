"""Reading safetensors files: headers checked byte by byte, then tensors, some rows at a time.

Owns the format; knows nothing of models. A file that passes `read_header` can be read without surprises:
every tensor lies inside it, and nothing else does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minivllm.exceptions import ModelFilesError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ROWS_TOGETHER = 64  # where a tensor is cut: kernels pack so many, or a part of them, side by side
_REMEDY = "the file is damaged or incomplete; download it again"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file."""

    name: str
    path: Path
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    begin: int  # in bytes from the start of the file
    num_bytes: int

    @property
    def is_float(self) -> bool:
        """Whether it is of a type that weights are read from."""
        return self.dtype in _TORCH


def float_dtypes() -> list[str]:
    return list(_TORCH)


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        ModelFilesError: the file cannot be read, or is not whole; the message names it.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header, data_begin = _parse_header(path, file, file_bytes)
    except OSError as error:
        raise ModelFilesError(f"cannot read {path}: {error.strerror}") from None
    header.pop("__metadata__", None)
    entries = [_entry(path, name, fields, data_begin) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.num_bytes))
    end = data_begin
    for entry in entries:
        if entry.begin != end:
            raise ModelFilesError(
                f"{path}: tensor {entry.name} starts at byte {entry.begin}, not at {end} where the one before "
                f"ends; {_REMEDY}"
            )
        end += entry.num_bytes
    if end != file_bytes:
        raise ModelFilesError(f"{path} has {file_bytes} bytes, its header describes {end}; {_REMEDY}")
    return entries


def _parse_header(path: Path, file: Any, file_bytes: int) -> tuple[dict[str, Any], int]:
    """The header's JSON object, and where the data begins."""
    if file_bytes < 8:
        raise ModelFilesError(f"{path} has {file_bytes} bytes, less than a safetensors header; {_REMEDY}")
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise ModelFilesError(
            f"{path}: the header claims {header_bytes} bytes of a file of {file_bytes}; either it is no "
            f"safetensors file, or {_REMEDY}"
        )
    try:
        header = json.loads(file.read(header_bytes))
    except ValueError:
        raise ModelFilesError(f"{path}: the header is not JSON; {_REMEDY}") from None
    if not isinstance(header, dict):
        raise ModelFilesError(f"{path}: the header is not a JSON object; {_REMEDY}")
    return header, 8 + header_bytes


def _entry(path: Path, name: str, fields: Any, data_begin: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        sizes_fit = all(_is_size(value) for value in [*shape, begin, end])
    except (TypeError, KeyError, ValueError):
        sizes_fit = False
    if not sizes_fit:
        raise ModelFilesError(f"{path}: the header's entry of tensor {name} is malformed; {_REMEDY}")
    if dtype not in _BYTES:
        raise ModelFilesError(f"{path}: tensor {name} is of type {dtype}, which is not known")
    num_bytes = math.prod(shape) * _BYTES[dtype]
    if end - begin != num_bytes:
        raise ModelFilesError(
            f"{path}: tensor {name}, {dtype} of shape {tuple(shape)}, needs {num_bytes} bytes and has "
            f"{end - begin}; {_REMEDY}"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_begin + begin, num_bytes)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_rows(
    path: Path, entries: list[TensorEntry], most_bytes: int
) -> Iterator[tuple[TensorEntry, int, torch.Tensor]]:
    """Each tensor of one file, some rows at a time: the tensor, the first row, the rows.

    At most `most_bytes` come at once, but at least a row; a tensor without dimensions is one. They are valid until the
    next are asked for: a thread reads these meanwhile, and there are two places, used in turn. (Mapping the file would
    have the system look up each of its pages for a single use.) Only float tensors can be asked for.

    Raises:
        ModelFilesError: the file cannot be read, or has become shorter.
    """
    pieces = [piece for entry in entries for piece in _pieces(entry, most_bytes)]
    if not pieces:
        return
    place_bytes = max(piece.num_bytes for piece in pieces)
    places = [torch.empty(place_bytes, dtype=torch.uint8) for _ in range(min(2, len(pieces)))]
    with _opened(path) as file, ThreadPoolExecutor(1, thread_name_prefix="read-weights") as reader:

        def read(i: int) -> torch.Tensor:
            return _read(file, path, pieces[i], places[i % 2])

        ahead = reader.submit(read, 0)
        for i, piece in enumerate(pieces):
            rows = ahead.result()
            if i + 1 < len(pieces):
                ahead = reader.submit(read, i + 1)
            yield piece.entry, piece.start, rows


def _opened(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise ModelFilesError(f"cannot read {path}: {error.strerror}") from None


class _Piece(NamedTuple):
    entry: TensorEntry
    start: int  # row
    shape: tuple[int, ...]
    begin: int  # in bytes from the start of the file
    num_bytes: int


def _pieces(entry: TensorEntry, most_bytes: int) -> Iterator[_Piece]:
    if not entry.shape or not entry.num_bytes:
        yield _Piece(entry, 0, entry.shape, entry.begin, entry.num_bytes)
        return
    all_rows, *row_shape = entry.shape
    row_bytes = entry.num_bytes // all_rows
    step = max(1, most_bytes // row_bytes)
    step -= step % _ROWS_TOGETHER if step > _ROWS_TOGETHER else 0
    for start in range(0, all_rows, step):
        num_rows = min(step, all_rows - start)
        begin = entry.begin + start * row_bytes
        yield _Piece(entry, start, (num_rows, *row_shape), begin, num_rows * row_bytes)


def _read(file: FileIO, path: Path, piece: _Piece, place: torch.Tensor) -> torch.Tensor:
    rows = place[: piece.num_bytes]
    left = memoryview(rows.numpy())
    try:
        file.seek(piece.begin)
        while left:
            num_read = file.readinto(left)
            if not num_read:
                raise ModelFilesError(f"{path} ends within tensor {piece.entry.name}; {_REMEDY}")
            left = left[num_read:]
    except OSError as error:
        raise ModelFilesError(f"cannot read {path}: {error.strerror}") from None
    return rows.view(_TORCH[piece.entry.dtype]).view(piece.shape)
