"""What the model runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DeviceConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: an NVIDIA GPU (compute capability 8.0 or above, with Triton installed) where torch finds one, else the
    CPU."""
    batch_invariant: bool = False
    """On a GPU: a row's bits never depend on what else is in the batch, on how a prompt was chunked or on what was
    cached. Slower; docs/gpu.md says by how much. On a CPU this is always so."""
    cuda_decode_attention: bool = True
    """On a GPU: decode attention by the CUDA C++ kernel, where minivllm was built with it and it serves the model's
    heads and the cache's type; else, and with --no-cuda-decode-attention, by Triton's. With --batch-invariant it is
    Triton's anyway, whose decode has the bits of its prefill."""
