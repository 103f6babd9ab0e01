"""The files of a checkpoint as the front end sees them before anything starts: names and sizes, never weights.

Owns what can be said in milliseconds without torch: JSON files are read, shards are there and not empty, a tokenizer
is there. Headers, tensor names and shapes are the worker's to check.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minivllm.exceptions import ModelFilesError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_PICKLES = ("*.bin", "*.pt", "*.pth")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        ModelFilesError: it is missing, unreadable, or holds something else; the message names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFilesError(f"{path} is missing; give a directory with a Hugging Face checkpoint") from None
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFilesError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path} holds a JSON {type(value).__name__}, not an object; fetch it again")
    return value


def find_shards(directory: Path) -> list[Path]:
    """The weight files: those the index names, else `model.safetensors`, else every `*.safetensors`.

    Raises:
        ModelFilesError: there is none, one the index names is missing, or one is empty.
    """
    index = directory / INDEX
    if index.exists():
        shards = [directory / name for name in _indexed(index)]
    elif (directory / "model.safetensors").exists():
        shards = [directory / "model.safetensors"]
    else:
        shards = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not shards:
        raise ModelFilesError(_why_no_shards(directory))
    for shard in shards:
        if not shard.is_file():
            raise ModelFilesError(f"{shard} is missing, but {INDEX} names it; fetch the file again")
        if shard.stat().st_size == 0:
            raise ModelFilesError(f"{shard} is empty; fetch the file again")
    return shards


def _indexed(index: Path) -> list[str]:
    """File names in an index, sorted. None may lie outside the directory."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFilesError(f"{index} has no weight_map from tensors to files; fetch it again")
    names = {name for name in weight_map.values() if isinstance(name, str)}
    wrong = [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]
    if wrong:
        raise ModelFilesError(f"{index} names the file {wrong[0]!r}; it must be a plain name in the same directory")
    return sorted(names)


def _why_no_shards(directory: Path) -> str:
    for pattern in _PICKLES:
        pickle = next(iter(sorted(directory.glob(pattern))), None)
        if pickle is not None:
            return (
                f"{directory} holds {pickle.name} but no *.safetensors: pickled weights can run code when they are "
                "read and are refused; convert them to safetensors"
            )
    gguf = next(iter(sorted(directory.glob("*.gguf"))), None)
    if gguf is not None:
        return f"{directory} holds {gguf.name} but no *.safetensors: GGUF is not supported yet"
    return f"{directory} holds no *.safetensors; fetch the weights, or pass --load-format dummy for random ones"


def check_tokenizer(directory: Path) -> None:
    """Raise ModelFilesError unless the directory has the files of some tokenizer."""
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise ModelFilesError(
            f"{directory} has no tokenizer (no {_TOKENIZERS[0]}); pass --tokenizer, or --skip-tokenizer-init to "
            "exchange token ids"
        )


def read_generation_config(model: Path, source: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Default sampling parameters and end-of-sequence tokens.

    source: "auto" (the model's own file, if it has one), "vllm" (of it, only the end-of-sequence tokens: they
    are the model's, not a taste), or a directory that has one.

    Raises:
        ModelFilesError: the file is not a JSON object, or the directory has none.
    """
    if source not in ("auto", "vllm"):
        return {**read_json(Path(source).expanduser() / GENERATION_CONFIG), **overrides}
    path = model / GENERATION_CONFIG
    found = read_json(path) if path.exists() else {}
    if source == "vllm":
        found = {key: found[key] for key in ("eos_token_id",) if key in found}
    return {**found, **overrides}
