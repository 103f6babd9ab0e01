"""The gated activations, by the name config.json gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minivllm.exceptions import ModelFilesError
from minivllm.ops.activation import silu_mul
from minivllm.ops.op import OpSpec

_GATED = {"silu": silu_mul, "swish": silu_mul}  # two names of one function


def gated_activation(name: str, *, dtype: torch.dtype, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function [T, 2 I] -> [T, I].

    Raises:
        ModelFilesError: the name is not known.
    """
    if name not in _GATED:
        raise ModelFilesError(
            f"hidden_act {name!r} in config.json is not served; these are: {', '.join(_GATED)}"
        )
    return _GATED[name].select(OpSpec(device, dtype))
