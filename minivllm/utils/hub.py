"""From what the user calls a model to a local directory: itself, or a snapshot from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from minivllm.exceptions import ModelFilesError
from minivllm.utils.text import one_line

TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
# The same weights once more, in other layouts.
_DUPLICATES = ("original/*", "consolidated*", "onnx/*", "openvino/*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_directory(
    name: str, *, revision: str | None = None, download_dir: str | None = None, files: tuple[str, ...] = MODEL_FILES
) -> Path:
    """The directory itself, or where the hub's files with this id now lie.

    Raises:
        ModelFilesError: it is no directory, and the hub does not give it.
    """
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path.resolve()
        if path.exists():
            raise ModelFilesError(f"{name} is a file; give the directory that holds config.json")
    except (OSError, RuntimeError) as error:  # no permission, too long a name, no such user's home
        raise ModelFilesError(f"{name[:200]} cannot be looked at: {one_line(error)[:200]}") from error
    if not _HUB_ID.fullmatch(name):
        raise ModelFilesError(f"{name} is neither a directory nor a hub id (organisation/name); check the path")
    return _snapshot(name, revision, download_dir, files)


def _snapshot(name: str, revision: str | None, download_dir: str | None, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # 0.6 s, and not needed for a directory

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=list(files),
                ignore_patterns=list(_DUPLICATES),
            )
        )
    except Exception as error:  # the library raises its own, httpx's and OSError: all mean the same here
        reason = one_line(error)[:300] or type(error).__name__
        raise ModelFilesError(f"{name} is neither a directory nor a model the hub gave: {reason}") from error
