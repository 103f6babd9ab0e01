"""A server that cannot start says why in one last line, names the culprit and the remedy, and exits non-zero."""

from __future__ import annotations

import json
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.server import Server


def edit_config(**changes) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def delete_a_shard(model: Path) -> None:
    shards(model)[0].unlink()


def truncate_a_shard(model: Path) -> None:
    path = shards(model)[-1]
    path.write_bytes(path.read_bytes()[:-1])


def break_a_header(model: Path) -> None:
    path = shards(model)[0]
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def edit_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        for path in shards(model):
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)

    return edit


def drop_norm(tensors: dict) -> None:
    tensors.pop("model.norm.weight", None)


def crop_norm(tensors: dict) -> None:
    if "model.norm.weight" in tensors:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def add_stranger(tensors: dict) -> None:
    if "model.norm.weight" in tensors:
        tensors["model.stranger.weight"] = tensors["model.norm.weight"].clone()


FAULTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no config": (lambda m: (m / "config.json").unlink(), ["config.json"]),
    "config is not JSON": (lambda m: (m / "config.json").write_text("{"), ["config.json"]),
    "unknown architecture": (edit_config(architectures=["MambaForCausalLM"]), ["MambaForCausalLM", "Qwen3ForCausalLM"]),
    "missing shard": (delete_a_shard, ["model-00001-of-00002.safetensors"]),
    "truncated shard": (truncate_a_shard, ["model-00002-of-00002.safetensors"]),
    "broken header": (break_a_header, ["model-00001-of-00002.safetensors"]),
    "missing tensor": (edit_tensors(drop_norm), ["model.norm.weight"]),
    "wrong shape": (edit_tensors(crop_norm), ["model.norm.weight", "63", "64"]),
    "left-over tensor": (edit_tensors(add_stranger), ["model.stranger.weight"]),
    "no kernel for the shape": (edit_config(hidden_act="gelu_unknown"), ["gelu_unknown"]),
    "unknown rope": (edit_config(rope_parameters={"rope_type": "spiral"}, rope_scaling=None), ["spiral"]),
}


@pytest.fixture(scope="session")
def sharded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from make_random_model import make_model

    return make_model(tmp_path_factory.mktemp("models") / "sharded", num_shards=2, seed=3)


def last_line_of_failed_start(model: Path, run_dir: Path, *args: str, port: int | None = None) -> str:
    server = Server(model, *args, run_dir=run_dir, port=port, wait=False)
    assert server.wait_exit(60) not in (0, None)
    assert list(run_dir.iterdir()) == []
    return server.log[-1]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_named(sharded_model: Path, tmp_path: Path, short_path: Path, fault: str):
    break_it, names = FAULTS[fault]
    model = tmp_path / "model"
    shutil.copytree(sharded_model, model)
    break_it(model)
    line = last_line_of_failed_start(model, short_path)
    assert line.startswith("minivllm: error: ")
    for name in names:
        assert name in line


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--block-size", "24"], ["24", "32"]),
        (["--max-model-len", "999999"], ["999999", "2048"]),
        (["--kv-cache-memory-bytes", "100Ki"], ["--max-model-len"]),
        (["--tensor-parallel-size", "2"], ["--tensor-parallel-size"]),
        (["--max-modle-len", "5"], ["--max-modle-len", "--max-model-len"]),
        (["--dtype", "int3"], ["--dtype", "int3"]),
        (["--max-num-batched-tokens", "0"], ["max_num_batched_tokens"]),
    ],
)
def test_a_wrong_argument_is_named(tiny_model: Path, short_path: Path, args: list[str], names: list[str]):
    line = last_line_of_failed_start(tiny_model, short_path, *args)
    assert line.startswith("minivllm: error: ")
    for name in names:
        assert name.replace("-", "_") in line.replace("-", "_")


def test_a_missing_model_directory_is_named(short_path: Path):
    assert "no/such/model" in last_line_of_failed_start(Path("no/such/model"), short_path)


def test_a_port_in_use_is_named(tiny_model: Path, short_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in last_line_of_failed_start(tiny_model, short_path, port=port)
