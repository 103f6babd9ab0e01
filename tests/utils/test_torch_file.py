"""Tensors as torch.save writes them are read without torch; anything else is refused, and nothing is run."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from typing import Any

import pytest
import torch

from minivllm.utils.torch_file import load_tensor


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def archive(description: bytes, storage: bytes = bytes(32), *, how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as made:
        made.writestr("archive/data.pkl", description)
        made.writestr("archive/byteorder", "little")
        made.writestr("archive/data/0", storage)
    return file.getvalue()


def described(tensor: torch.Tensor) -> bytes:
    with zipfile.ZipFile(io.BytesIO(saved(tensor))) as made:
        return made.read("archive/data.pkl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        lambda t: t[:1],
        lambda t: t[None],
        lambda t: t[2:5],
        lambda t: t[:, 3:6],
        lambda t: t[::2, ::3],
        lambda t: t.t(),
        lambda t: t[:1].expand(4, -1),
        lambda t: t.clone().requires_grad_(),
    ],
    ids=["plain", "one row", "batch of one", "rows", "columns", "strided", "transposed", "expanded", "with grad"],
)
def test_what_torch_saved_is_read(dtype: torch.dtype, make):
    tensor = make(torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).to(dtype))
    read = load_tensor(saved(tensor))
    assert (read.shape, f"torch.{read.dtype}") == (tuple(tensor.shape), str(dtype))
    assert read.data() == tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def test_other_protocols_of_pickle_are_read_too():
    tensor = torch.randn(3, 4)
    for protocol in (2, 3, 4):
        assert load_tensor(saved(tensor, pickle_protocol=protocol)).data() == tensor.numpy().tobytes()


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": torch.zeros(2)}, "EMPTY_DICT"),
        ([torch.zeros(2)], "EMPTY_LIST"),
        (torch.nn.Parameter(torch.zeros(2)), "_rebuild_parameter"),
        (torch.zeros(2, 2).to_sparse(), "not called here"),
        (torch.zeros(2, dtype=torch.complex64), "ComplexFloatStorage"),
        (5, "not one dense tensor"),
        (Evil(), "system"),
    ],
)
def test_anything_else_is_refused_by_name(value: Any, says: str):
    with pytest.raises(ValueError, match=says):
        load_tensor(saved(value))


@pytest.mark.parametrize(
    "file",
    [b"", b"torch", saved(torch.zeros(2), _use_new_zipfile_serialization=False), saved(torch.zeros(9))[:-40]],
    ids=["nothing", "text", "the old format", "cut short"],
)
def test_what_is_no_such_file_is_refused(file: bytes):
    with pytest.raises(ValueError, match="not what torch.save writes"):
        load_tensor(file)


def nested(depth: int) -> bytes:
    """A tuple of two of the same, so often that to walk or hash it would take for ever."""
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return pickle.dumps(value, protocol=2)


@pytest.mark.parametrize(
    "description",
    [
        pickle.dumps(Evil(), protocol=2),
        nested(100),
        described(torch.zeros(2, 2))[:-1],
        described(torch.zeros(2, 2)).replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"),
        described(torch.zeros(2, 2)).replace(b"torch\nFloatStorage", b"os\nsystem"),
        b"\x80\x02R.",
        b"\x80\x02(Q.",
        b"\x80\x02t.",
        b"\x80\x02h\x05.",
        b"." * 5000,
        b"",
    ],
)
def test_a_description_of_ones_own_is_refused(description: bytes):
    with pytest.raises(ValueError, match="not one dense tensor|torch.save"):
        load_tensor(archive(description))


def test_a_tensor_cannot_reach_beyond_its_storage():
    for described_as, num_bytes in ((torch.zeros(2, 4), 28), (torch.zeros(9, 4)[5:7], 100)):
        with pytest.raises(ValueError, match="beyond"):
            load_tensor(archive(described(described_as), bytes(num_bytes))).data()
    huge = described(torch.zeros(2, 4)).replace(b"K\x02K\x04\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86")
    with pytest.raises(ValueError, match="sizes"):
        load_tensor(archive(huge))


def test_a_compressed_archive_is_refused_before_it_is_unpacked():
    bomb = archive(described(torch.zeros(2, 2)), bytes(1 << 20), how=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        load_tensor(bomb)


def test_it_needs_no_torch():
    code = (
        "import sys; from minivllm.utils.torch_file import load_tensor; import minivllm.engine.prompt_embeds;"
        "assert load_tensor(sys.stdin.buffer.read()).shape == (2, 3); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], input=saved(torch.zeros(2, 3)), check=True)
