"""Where the model that ships with the package lies."""

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
    if not (_DIRECTORY / "config.json").is_file():
        raise ModelFilesError(
            f"this installation has no model in the box (no config.json in {_DIRECTORY}); "
            "name a model, or train one with python -m examples.box_model.train"
        )
    return _DIRECTORY
