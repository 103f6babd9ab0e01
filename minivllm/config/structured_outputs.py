"""How answers are held to a form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from minivllm.exceptions import ConfigError

BACKENDS = ("auto", "guidance")
_OTHER_BACKENDS = ("xgrammar", "outlines", "lm-format-enforcer")


@dataclass(frozen=True)
class StructuredOutputsConfig:
    structured_outputs_config: dict[str, Any] | None = None
    """How structured outputs are done: a JSON object with backend (auto or guidance, which are the same),
    disable_any_whitespace and disable_additional_properties (for every request), enable_in_reasoning, and preload
    (true: read the vocabulary at the start; false: when the first constraint comes, whom it may hold up; else when the
    engine has nothing to do)."""


class StructuredOutputsOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What --structured-outputs-config may say; vLLM's names and defaults."""

    backend: str = "auto"
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    enable_in_reasoning: bool = False  # what a reasoning model thinks must match, too
    disable_fallback: bool = False  # there is one backend
    # Ours: read the vocabulary at the start (True), when the first constraint comes (False), or once the engine idles.
    preload: bool | None = None


def read_structured_outputs_config(values: dict[str, Any] | None) -> StructuredOutputsOptions:
    """Check what the user gave.

    Raises:
        ConfigError: a key is unknown or its value wrong; the message names it.
    """
    try:
        options = msgspec.convert(values or {}, StructuredOutputsOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"structured_outputs_config: {error}".replace("`", "")) from None
    if options.backend not in BACKENDS:
        known = options.backend in _OTHER_BACKENDS
        raise ConfigError(
            f"structured_outputs_config: backend={options.backend} is "
            f"{'one of vLLM that minivllm does not have' if known else 'unknown'}; use auto or guidance"
        )
    return options
