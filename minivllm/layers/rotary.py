"""The rotary table: which angle each position turns each pair of dimensions by, and how long contexts scale it.

Owns the frequencies; the rotation is `ops/rotary.py`. Every formula gives the bits that Hugging Face's
gives in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from minivllm.config.hf_config import HFConfig
from minivllm.ops.rotary import HeadNorms, Turn

# [head_dim / 2] float32 in radians a token; factor of cosine and sine.
Frequencies = tuple[torch.Tensor, float]


class RotaryEmbedding:
    """How queries and keys are turned by their positions."""

    def __init__(self, config: HFConfig, max_positions: int, *, device: str) -> None:
        """max_positions: length of the table, in tokens."""
        frequencies, factor = rope_frequencies(config)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        self.cos_sin = torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1).to(device)

    def turn(self, positions: torch.Tensor, norms: HeadNorms | None = None) -> Turn:
        """For tokens at these positions, [T] int64; norms come first."""
        return Turn(positions, self.cos_sin, norms)


def rope_frequencies(config: HFConfig) -> Frequencies:
    """The frequencies that the config's rope type gives; `HFConfig` has checked that its parameters are there."""
    parameters = config.rope_parameters
    return _FREQUENCIES[parameters.get("rope_type", "default")](config, parameters)


def _default(config: HFConfig, parameters: dict[str, Any]) -> Frequencies:
    """Su et al. 2021, arXiv:2104.09864."""
    return 1.0 / _wave_numbers(config), 1.0


def _wave_numbers(config: HFConfig) -> torch.Tensor:
    """theta^(2 i / head_dim): tokens a radian, for each pair i."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    return config.rope_theta**exponents


def _linear(config: HFConfig, parameters: dict[str, Any]) -> Frequencies:
    """Positions pressed together (Chen et al. 2023, arXiv:2306.15595)."""
    return _default(config, parameters)[0] / parameters["factor"], 1.0


def _llama3(config: HFConfig, parameters: dict[str, Any]) -> Frequencies:
    """Llama 3.1: long waves are stretched, short ones kept, those between interpolated."""
    frequencies, _ = _default(config, parameters)
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(is_between, between, scaled), 1.0


def _yarn(config: HFConfig, parameters: dict[str, Any]) -> Frequencies:
    """YaRN: interpolate what turns slowly, keep what turns fast (Peng et al. 2023, arXiv:2309.00071)."""
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = parameters["factor"] or config.max_position_embeddings / original
    pairs = config.head_dim // 2

    def pair_that_turns(num_rotations: float) -> float:
        """The pair that turns so often over the original context."""
        full_turns = math.log(original / (num_rotations * 2 * math.pi))
        return config.head_dim * full_turns / (2 * math.log(config.rope_theta))

    low = pair_that_turns(parameters.get("beta_fast") or 32)
    high = pair_that_turns(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = (high - low) or 0.001  # no division by zero
    kept = 1 - ((torch.arange(pairs, dtype=torch.float32) - low) / width).clamp(0, 1)
    waves = _wave_numbers(config)
    frequencies = 1.0 / (factor * waves) * (1 - kept) + 1.0 / waves * kept
    return frequencies, _yarn_attention_factor(factor, parameters)


def _yarn_attention_factor(factor: float, parameters: dict[str, Any]) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return given

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if numerator and denominator:
        return scale(numerator) / scale(denominator)
    return scale(1.0)


# One for each of `hf_config.ROPE_TYPES`.
_FREQUENCIES: dict[str, Callable[[HFConfig, dict[str, Any]], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
