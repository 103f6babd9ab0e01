"""What is refused before a weight is read: files, headers, names, shapes, types; and what is then loaded."""

from __future__ import annotations

import json
import os
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from make_random_model import make_model
from safetensors.torch import load_file, save_file

from minivllm.exceptions import ConfigError, ModelFilesError
from minivllm.models import loader
from minivllm.models.safetensors import read_header, read_rows
from minivllm.sampling_params import SamplingParams
from minivllm.worker.worker import Worker
from tests.models.loop import Loop, engine_config

SECOND = "model-00002-of-00003.safetensors"
A_NORM = "model.layers.1.input_layernorm.weight"
A_MATRIX = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return make_model(tmp_path / "single", arch="qwen3")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_model(tmp_path / "sharded", arch="qwen3", num_shards=3)


def start(model: Path, **options) -> Worker:
    worker = Worker(engine_config(model, num_gpu_blocks_override=64, **options))
    worker.initialize(lambda phase: None)
    return worker


def refused(model: Path, *words: str, error: type[ConfigError] = ModelFilesError, **options) -> None:
    """Starting fails before any weight is read, in one line that holds all the words."""
    phases: list[str] = []
    with pytest.raises(error) as caught:
        Worker(engine_config(model, num_gpu_blocks_override=64, **options)).initialize(phases.append)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert "loading weights" not in phases


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def change_header(path: Path, edit: Callable[[dict], None]) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


# Files -----------------------------------------------------------------------


def test_a_directory_without_weights_is_refused(single: Path):
    (single / "model.safetensors").unlink()
    refused(single, str(single), "no *.safetensors")


def test_pickled_weights_are_named_and_refused(single: Path):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, "pytorch_model.bin", "pickle")


def test_a_missing_shard_is_named(sharded: Path):
    (sharded / SECOND).unlink()
    refused(sharded, SECOND, "missing")


def test_shards_swapped_on_disk_are_found_out(sharded: Path):
    first, second = sharded / SECOND.replace("00002", "00001"), sharded / SECOND
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    refused(sharded, "tensor ", "-of-00003.safetensors", loader.INDEX)


@pytest.mark.parametrize(
    "text", ["", "not json", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_malformed_index_is_refused(sharded: Path, text: str):
    (sharded / loader.INDEX).write_text(text)
    refused(sharded, loader.INDEX, "weight_map")


def test_an_index_cannot_reach_outside_its_directory(sharded: Path):
    index = json.loads((sharded / loader.INDEX).read_text())
    index["weight_map"][A_NORM] = "../elsewhere.safetensors"
    (sharded / loader.INDEX).write_text(json.dumps(index))
    refused(sharded, "../elsewhere.safetensors")


def test_an_index_that_lists_a_tensor_no_file_has_is_refused(sharded: Path):
    index = json.loads((sharded / loader.INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = SECOND
    (sharded / loader.INDEX).write_text(json.dumps(index))
    refused(sharded, "model.extra.weight", SECOND)


def test_files_that_the_index_does_not_list_are_left_alone(sharded: Path):
    save_file({"anything": torch.ones(1)}, sharded / "consolidated.safetensors")
    start(sharded)


def test_a_tensor_in_two_files_is_refused(single: Path):
    (single / "model.safetensors").rename(single / "a.safetensors")
    save_file({A_NORM: torch.ones(64)}, single / "b.safetensors")
    refused(single, A_NORM, "a.safetensors", "b.safetensors")


# Headers ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_cut_short_is_refused(single: Path, length: int):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(single, str(path), "download it again")


def test_a_file_with_bytes_too_many_is_refused(single: Path):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(single, str(path), "bytes")


def test_a_header_length_that_lies_is_refused(single: Path):
    path = single / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    refused(single, str(path), str(1 << 60))


@pytest.mark.parametrize("header", [b"{", b"[]", b"\xff\xfe"])
def test_a_header_that_is_no_json_object_is_refused(single: Path, header: bytes):
    path = single / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(single, str(path), "JSON")


@pytest.mark.parametrize(
    "fields",
    [
        None,
        {"dtype": "F32", "shape": [64]},
        {"dtype": "F32", "shape": [-64], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": "64", "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, 256, 3]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, 255]},
        {"dtype": "F32", "shape": [64], "data_offsets": [256, 0]},
        {"dtype": "F31", "shape": [64], "data_offsets": [0, 256]},
    ],
)
def test_a_malformed_entry_is_refused_by_tensor(single: Path, fields: dict | None):
    change_header(single / "model.safetensors", lambda header: header.update({A_NORM: fields}))
    refused(single, A_NORM, "model.safetensors")


def test_tensors_that_overlap_are_refused(single: Path):
    path = single / "model.safetensors"
    other = next(entry for entry in read_header(path) if entry.shape == (64,) and entry.name != A_NORM)

    def overlap(header: dict) -> None:
        header[A_NORM]["data_offsets"] = header[other.name]["data_offsets"]

    change_header(path, overlap)
    refused(single, str(path), "starts at byte")


# Names, shapes and types -----------------------------------------------------


def test_a_missing_tensor_is_named_with_its_shape(single: Path):
    change(single / "model.safetensors", lambda tensors: tensors.pop(A_NORM))
    refused(single, A_NORM, "(64,)", "missing")


def test_a_left_over_tensor_is_named(single: Path):
    change(
        single / "model.safetensors", lambda tensors: tensors.update({"model.layers.2.bias": torch.ones(1)})
    )
    refused(single, "model.layers.2.bias", "left over")


def test_a_wrong_shape_is_named_beside_the_right_one(single: Path):
    change(single / "model.safetensors", lambda tensors: tensors.update({A_MATRIX: torch.ones(64, 128)}))
    refused(single, A_MATRIX, "(64, 128)", "(128, 64)")


def test_a_type_that_is_not_read_is_named(single: Path):
    def quantize(tensors: dict) -> None:
        tensors[A_MATRIX] = torch.ones(128, 64, dtype=torch.int8)

    change(single / "model.safetensors", quantize)
    refused(single, A_MATRIX, "I8", "BF16")


def test_several_faults_of_a_kind_are_counted(single: Path):
    def drop_layer(tensors: dict) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            tensors.pop(name)

    change(single / "model.safetensors", drop_layer)
    refused(single, "and 10 more such")


def test_harmless_extras_are_ignored(single: Path):
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "lm_head.weight": torch.ones(2, 2),
    }
    change(single / "model.safetensors", lambda tensors: tensors.update(extras))
    start(single)


def test_an_untied_model_needs_its_lm_head(tmp_path: Path):
    path = make_model(tmp_path / "m", tie_word_embeddings=False)
    change(path / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    refused(path, "lm_head.weight", "missing")


def test_a_shape_no_kernel_takes_is_refused(tmp_path: Path):
    refused(make_model(tmp_path / "m", head_dim=24), "head_dim 24", "16", error=ConfigError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
        ("num_key_value_heads", 3),
        ("layer_types", ["full_attention", "chunked_attention"]),
        ("layer_types", ["full_attention"]),
    ],
)
def test_what_config_json_asks_for_and_is_not_served_is_refused_by_name(
    single: Path, key: str, value: object
):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {key: value}))
    named = value["rope_type"] if isinstance(value, dict) else key.replace("layer_types", "layer")
    refused(single, named, "config.json")


# Rows ------------------------------------------------------------------------


@pytest.mark.parametrize("most_bytes", [1, 300, 64 * 22, 130 * 22, 1 << 20])
def test_tensors_come_whole_in_pieces_that_a_kernel_packs_well(tmp_path: Path, most_bytes: int):
    tensors = {
        "a": torch.randn(300, 11).bfloat16(), "b": torch.randn(5), "c": torch.tensor(3.5), "d": torch.zeros(0, 4),
        "e": torch.randn(7, 3, 2, dtype=torch.float16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    found: dict[str, list[torch.Tensor]] = {name: [] for name in tensors}
    entries = {entry.name: entry for entry in read_header(tmp_path / "x.safetensors")}
    for entry, start, rows in read_rows(tmp_path / "x.safetensors", list(entries.values()), most_bytes):
        row_bytes = entry.num_bytes // max(1, entry.shape[0]) if entry.shape else entry.num_bytes
        assert rows.nbytes <= max(most_bytes, row_bytes)
        assert start == sum(map(len, found[entry.name])) and (start < 64 or start % 64 == 0 or most_bytes < 64 * 22)
        found[entry.name].append(rows.clone())
    for name, tensor in tensors.items():
        whole = torch.cat(found[name]) if tensor.dim() else found[name][0]
        assert torch.equal(whole, tensor) and whole.dtype == tensor.dtype


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_file_that_became_shorter_is_an_error_and_no_crash(tmp_path: Path, when: str):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(1 << 16, 16)}, path)
    entries = read_header(path)
    rows = read_rows(path, entries, 1 << 20)
    if when == "meanwhile":
        next(rows)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(ModelFilesError, match="ends within tensor a"):
        list(rows)


def test_a_file_that_is_gone_by_now_is_named(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 2)}, path)
    entries = read_header(path)
    path.unlink()
    with pytest.raises(ModelFilesError, match=f"cannot read {re.escape(str(path))}: No such file"):
        next(read_rows(path, entries, 100))


def test_a_reader_that_is_left_early_leaves_no_thread(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100, 100)}, path)
    rows = read_rows(path, read_header(path), 400)
    next(rows)
    assert any(thread.name.startswith("read-weights") for thread in threading.enumerate())
    rows.close()
    assert not any(thread.name.startswith("read-weights") for thread in threading.enumerate())


# Values ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_a_number_is_refused_by_name(single: Path, value: float):
    def poison(tensors: dict) -> None:
        tensors[A_MATRIX][5, 7] = value

    change(single / "model.safetensors", poison)
    with pytest.raises(ModelFilesError, match=re.escape(A_MATRIX)):
        start(single)


def test_a_weight_that_float16_cannot_hold_is_refused_by_name(single: Path):
    def enlarge(tensors: dict) -> None:
        tensors[A_MATRIX][5, 7] = -1e6

    change(single / "model.safetensors", enlarge)
    start(single, dtype="bfloat16")
    with pytest.raises(ModelFilesError, match=re.escape(A_MATRIX) + r".*1e\+06.*bfloat16"):
        start(single, dtype="float16")


def test_shards_and_a_single_file_load_the_same_model(single: Path, sharded: Path):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=1)
    answers = [Loop(path).run([[5, 6, 7]], params) for path in (single, sharded)]
    assert answers[0] == answers[1]


def test_tensors_at_odd_bytes_are_read(tmp_path: Path):
    aligned = make_model(tmp_path / "aligned", dtype="bfloat16")
    odd = make_model(tmp_path / "odd", dtype="bfloat16")
    path = odd / "model.safetensors"
    change_header(path, lambda header: None)  # written without padding: the header may end anywhere
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    padding = b" " * (1 - size % 2)
    path.write_bytes(struct.pack("<Q", size + len(padding)) + data[8 : 8 + size] + padding + data[8 + size :])
    assert read_header(path)[0].begin % 2 == 1
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=1)
    assert Loop(odd).run([[5, 6, 7]], params) == Loop(aligned).run([[5, 6, 7]], params)


def test_dummy_weights_need_no_files_and_follow_the_seed(single: Path):
    (single / "model.safetensors").unlink()
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    first, again, other = (
        Loop(single, load_format="dummy", seed=seed).run([[5, 6, 7]], params)[0] for seed in (1, 1, 2)
    )
    assert first == again
    assert first.logprobs != other.logprobs


def test_a_served_model_does_not_need_its_files(single: Path):
    loop = Loop(single)
    for file in single.iterdir():
        file.unlink()
    assert len(loop.run([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4))[0].tokens) == 4
