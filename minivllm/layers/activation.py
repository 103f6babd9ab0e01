"""The gated activations, by the name config.json gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minivllm.config.hf_config import HIDDEN_ACTS
from minivllm.ops.activation import silu_mul
from minivllm.ops.op import OpSpec

_GATED = dict.fromkeys(HIDDEN_ACTS, silu_mul)  # one function, whatever its name


def gated_activation(name: str, *, dtype: torch.dtype, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function [T, 2 I] -> [T, I]; `HFConfig` has checked the name."""
    return _GATED[name].select(OpSpec(device, dtype))
