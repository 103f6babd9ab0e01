"""One tensor out of the bytes that torch.save wrote, without torch, and without unpickling: nothing in them is run.

Such a file is a zip archive: `data.pkl` describes the tensor in a few pickle instructions, `data/<key>` is its storage.
Only the instructions with which torch describes a dense tensor are followed, here, by hand; the names in them are
compared and never looked up. Everything is bounded by the size of the file.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from typing import Any, NamedTuple

_MAX_DESCRIPTION_BYTES = 4096  # of data.pkl; torch's are some 300
_MAX_DIMENSIONS = 8
_MAX_ENTRIES = 64  # of the archive
_STORAGES = {
    "torch FloatStorage": ("float32", 4), "torch HalfStorage": ("float16", 2), "torch BFloat16Storage": ("bfloat16", 2),
    "torch DoubleStorage": ("float64", 8), "torch LongStorage": ("int64", 8), "torch IntStorage": ("int32", 4),
    "torch ByteStorage": ("uint8", 1), "torch BoolStorage": ("bool", 1),
}  # fmt: skip


class SavedTensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str  # as torch names it
    storage: bytes
    offset: int  # of the first element in the storage, in elements
    strides: tuple[int, ...]  # likewise

    def data(self) -> bytes:
        """Its elements in row-major order, little endian.

        Raises:
            ValueError: they reach beyond the storage.
        """
        import numpy as np  # a server's start does not wait for it

        size = _SIZES[self.dtype]
        try:
            elements = np.ndarray(
                self.shape,
                f"V{size}",
                self.storage,
                self.offset * size,
                tuple(stride * size for stride in self.strides),
            )
        except (TypeError, ValueError, OverflowError) as error:  # numpy checks them against the buffer
            raise ValueError("the tensor reaches beyond what was saved of it") from error
        return elements.tobytes()


_SIZES = dict(_STORAGES.values())


class _Name(str):
    """Of something torch would import."""


class _Storage(NamedTuple):
    dtype: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = object()


def load_tensor(saved: bytes) -> SavedTensor:
    """The tensor that `torch.save(tensor, file)` wrote.

    Raises:
        ValueError: it is no such file, or holds anything but one dense tensor; the message says which.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(saved)) as archive:
            entries = _entries(archive)
            tensor = _follow(_read(archive, entries, "data.pkl", _MAX_DESCRIPTION_BYTES))
            if "byteorder" in entries and _read(archive, entries, "byteorder", 16) != b"little":
                raise ValueError("the tensor is not little endian")
            storage = _read(archive, entries, f"data/{tensor.storage.key}", len(saved))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(f"it is not what torch.save writes ({type(error).__name__}: {error})") from error
    return SavedTensor(tensor.shape, tensor.storage.dtype, storage, tensor.offset, tensor.strides)


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """By name, without the directory they all lie in."""
    infos = archive.infolist()
    if len(infos) > _MAX_ENTRIES:
        raise ValueError(f"it holds {len(infos)} entries; a tensor has a few")
    return {info.filename.partition("/")[2]: info for info in infos}


def _read(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], name: str, most: int) -> bytes:
    info = entries.get(name)
    if info is None:
        raise ValueError(f"it is not what torch.save writes: there is no {name}")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
        raise ValueError(f"it is not what torch.save writes: {name} is compressed, or too large")
    return archive.read(info)


def _follow(description: bytes) -> _Tensor:
    """What the instructions describe: a stack machine of those that torch uses."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for instruction, argument, _ in pickletools.genops(description):
            name = instruction.name
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                break
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            else:
                stack.append(_value(name, argument, stack, memo))
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not one dense tensor: {error}") from error
    if len(stack) != 1 or not isinstance(stack[0], _Tensor):
        raise ValueError("it is not one dense tensor")
    return stack[0]


def _value(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> Any:
    """What one instruction puts on the stack, once it has taken from it what it needs."""
    match name:
        case "GLOBAL":
            return _Name(argument)
        case "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            return _Name(f"{module} {attribute}")
        case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
            return argument
        case "NEWTRUE" | "NEWFALSE":
            return name == "NEWTRUE"
        case "MARK":
            return _MARK
        case "EMPTY_TUPLE":
            return ()
        case "TUPLE":
            at = len(stack) - 1 - stack[::-1].index(_MARK)
            taken = tuple(stack[at + 1 :])
            del stack[at:]
            return taken
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            count = int(name[-1])
            taken = tuple(stack[-count:])
            if len(taken) < count:
                raise IndexError("too little on the stack")
            del stack[-count:]
            return taken
        case "BINGET" | "LONG_BINGET":
            return memo[argument]
        case "BINPERSID":
            return _storage(stack.pop())
        case "REDUCE":
            arguments, what = stack.pop(), stack.pop()
            return _made(what, arguments)
    raise ValueError(f"the instruction {name} has no place in it")


def _storage(id_: Any) -> _Storage:
    """("storage", its class, key, device, number of elements)."""
    kind, of, key, _, _ = id_
    if kind != "storage" or not isinstance(of, _Name) or of not in _STORAGES:
        raise ValueError(f"{str(of):.60} is no dense storage that is read here")
    if not isinstance(key, str) or isinstance(key, _Name):
        raise ValueError("its storage has no name")
    return _Storage(_STORAGES[of][0], key)


def _made(what: Any, arguments: Any) -> Any:
    """The result of a call: that of the two which torch makes for a tensor."""
    if not isinstance(what, _Name):
        raise ValueError("something is called that has no name")
    if what == "collections OrderedDict" and arguments == ():
        return ()  # of hooks
    if what != "torch._utils _rebuild_tensor_v2":
        raise ValueError(f"{what:.60} is not called here")
    storage, offset, shape, strides = arguments[:4]
    numbers = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("its description is incomplete")
    if any(type(number) is not int or not 0 <= number < 1 << 40 for number in numbers) or math.prod(shape) >= 1 << 40:
        raise ValueError("its sizes are none")
    return _Tensor(storage, offset, shape, strides)
