"""How weights come from disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoadConfig:
    download_dir: str | None = None
    """Where hub models are kept; default: the hub library's cache."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """auto and safetensors read *.safetensors; dummy makes seeded random weights of the model's shape."""
    use_tqdm_on_load: bool = True
    """Show a progress bar while weights load."""
