"""Reading safetensors files: headers checked byte by byte, tensors mapped where they lie.

Owns the format; knows nothing of models. A file that passes `read_header` can be mapped without surprises:
every tensor lies inside it, and nothing else does.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minivllm.exceptions import ModelFilesError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
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


def map_tensors(path: Path, entries: list[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
    """Each tensor of one file as it lies on disk; a tensor is valid until the next one is asked for.

    Pages are dropped once the tensor has been used, so that a checkpoint is never resident as a whole. Only
    float tensors can be asked for.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        for entry in entries:
            if not entry.num_bytes:
                yield entry, torch.empty(entry.shape, dtype=_TORCH[entry.dtype])
                continue
            yield entry, _view(mapped, entry)
            _drop_pages(mapped, entry)


def _view(mapped: mmap.mmap, entry: TensorEntry) -> torch.Tensor:
    dtype = _TORCH[entry.dtype]
    # The kernels want aligned elements; the format does not promise them.
    aligned = entry.begin % dtype.itemsize == 0
    buffer = mapped if aligned else bytearray(mapped[entry.begin : entry.begin + entry.num_bytes])
    offset = entry.begin if aligned else 0
    flat = torch.frombuffer(buffer, dtype=dtype, count=math.prod(entry.shape), offset=offset)
    return flat.view(entry.shape)


def _drop_pages(mapped: mmap.mmap, entry: TensorEntry) -> None:
    begin = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, begin, entry.begin + entry.num_bytes - begin)
