"""The ops' door to the Triton kernels: whether they can serve a spec. Imports no Triton: a CPU never pays for it.

The kernels are in `ops/triton/`, one file an op, and an `Impl` names them as text ("triton.rms_norm:rms_norm").
"""

from __future__ import annotations

import importlib.util

import torch

from minivllm.ops.op import OpSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(spec: OpSpec) -> str | None:
    """Why the Triton kernels cannot serve `spec`: another device, no Triton, or another dtype."""
    if torch.device(spec.device).type != "cuda":
        return f"needs CUDA, got {spec.device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if spec.dtype not in DTYPES:
        return f"no {spec.dtype} kernel"
    return None


def float32_why_not(spec: OpSpec) -> str | None:
    """The same for what works on logits."""
    if spec.dtype != torch.float32:
        return f"logits are {spec.dtype}, not torch.float32"
    return why_not(spec)


def has_fp8(device: str) -> bool:
    """Whether the card converts float8_e4m3 by itself (compute capability 8.9, so Ada and Hopper)."""
    return torch.cuda.get_device_capability(device) >= (8, 9)
