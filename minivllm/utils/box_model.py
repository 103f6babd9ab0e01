"""Where the models that ship with the package lie."""

from __future__ import annotations

from pathlib import Path

from minivllm.exceptions import ModelFilesError

BOX_MODEL_NAME = "minnow"
_DIRECTORY = Path(__file__).resolve().parent.parent / "box_model"


def is_box_model(path: str) -> bool:
    """Whether a model's directory is that of the model in the box."""
    return Path(path).expanduser().resolve() == _DIRECTORY


def box_model_path() -> Path:
    """The directory of the model in the box, which needs no download.

    Raises:
        ModelFilesError: this installation was built without it.
    """
    return _existing(_DIRECTORY)


def box_draft_model_path() -> Path:
    """The directory of its draft: a smaller model with the same tokenizer, which guesses what the other will say.

    Raises:
        ModelFilesError: this installation was built without it.
    """
    return _existing(_DIRECTORY / "draft")


def _existing(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise ModelFilesError(
            f"this installation has no model in the box (no config.json in {directory}); "
            "name a model, or train one with python -m examples.box_model.train"
        )
    return directory
