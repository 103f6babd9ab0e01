"""The files of a checkpoint as the front end sees them before anything starts: names and sizes, never weights.

Owns what can be said in milliseconds without torch: JSON files are read, shards are there and not empty, a tokenizer
is there and is one, chat templates compile. Headers, tensor names and shapes are the worker's to check.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from minivllm.exceptions import ModelFilesError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_VOCABULARIES = (TOKENIZER, "*.model", "vocab.json", "vocab.txt", "*.tiktoken")  # of any tokenizer we know of
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
    """Raise ModelFilesError unless the directory has the files of some tokenizer, and those we can judge are right."""
    path = directory / TOKENIZER_CONFIG
    config = read_json(path) if path.exists() else {}
    # "auto_map": the tokenizer is code in the directory, which knows its own files.
    if "auto_map" not in config and not any(any(directory.glob(name)) for name in _VOCABULARIES):
        raise ModelFilesError(
            f"{directory} has no tokenizer (no {TOKENIZER}); pass --tokenizer, or --skip-tokenizer-init to "
            "exchange token ids"
        )
    if (directory / TOKENIZER).exists():
        _check_tokenizer_json(directory / TOKENIZER)
    for source, template in _chat_templates(directory, config):
        if reason := why_no_template(template):
            raise ModelFilesError(f"the chat template in {source} is not a Jinja template: {reason}; correct it")


class _TokenizerFile(msgspec.Struct):
    """What is looked at of a tokenizer.json, which has millions of characters: that the whole is JSON, and this."""

    model: dict[str, msgspec.Raw]


def _check_tokenizer_json(path: Path) -> None:
    try:
        msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.ValidationError:
        raise ModelFilesError(f'{path} has no "model": it is not a tokenizer; fetch it again') from None
    except (msgspec.DecodeError, ValueError) as error:
        raise ModelFilesError(f"{path} is not JSON: {error}; fetch it again") from error


def _chat_templates(directory: Path, config: dict[str, Any]) -> list[tuple[Path, str]]:
    """The chat templates of a tokenizer: a file of their own, or one or several named ones in its config."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return [(path, path.read_text(encoding="utf-8", errors="replace"))]
    found = config.get("chat_template")
    templates = [one.get("template") for one in found if isinstance(one, dict)] if isinstance(found, list) else [found]
    return [(directory / TOKENIZER_CONFIG, template) for template in templates if isinstance(template, str)]


def why_no_template(text: str) -> str | None:
    """Why a chat template does not compile, or None. Nothing of it is run."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' own tag, which marks what the assistant says."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    try:
        environment.compile(text)
    except TemplateSyntaxError as error:
        return f"{error.message} (line {error.lineno})"
    except RecursionError:
        return "it is nested too deeply"
    return None


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
