"""The gated activations, by the name config.json gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minivllm.config.hf_config import HIDDEN_ACTS
from minivllm.ops.activation import gelu_tanh_mul, silu_mul
from minivllm.ops.op import OpSpec

# One for each of `hf_config.HIDDEN_ACTS`; a function may have two names.
_GATED = {"silu": silu_mul, "swish": silu_mul, "gelu_pytorch_tanh": gelu_tanh_mul}
assert set(_GATED) == set(HIDDEN_ACTS)


def gated_activation(name: str, *, dtype: torch.dtype, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function [T, 2 I] -> [T, I]; `HFConfig` has checked the name."""
    return _GATED[name].select(OpSpec(device, dtype))
