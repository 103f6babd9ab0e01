"""The door to the native kernels: whether they can be used, and how tensors are handed over.

Owns the import of `minivllm._native` and the variables that tune it; knows nothing of any operation. The
extension sees addresses, shapes and strides (in elements), never torch; callers keep the tensors alive and
check shapes before they call.
"""

from __future__ import annotations

from types import ModuleType

import torch

from minivllm import envs
from minivllm.ops.op import OpSpec

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/cpu/types.h


def _import_extension() -> tuple[ModuleType | None, str | None]:
    """The extension, or None and why it cannot be used."""
    try:
        from minivllm import _native
    except ImportError as error:
        return None, f"the native extension is not built: {error}"
    _apply_environment(_native)
    if _native.isa() == "none":
        return _native, "no native kernel for this processor: x86-64 with AVX2 is needed"
    return _native, None


def _apply_environment(extension: ModuleType) -> None:
    """Honour the variables that lower the instruction set and set the number of threads."""
    if cap := envs.get("MINIVLLM_CPU_ISA"):
        try:
            extension.cap_isa(cap)
        except ValueError as error:
            raise ValueError(f"MINIVLLM_CPU_ISA={cap!r}: {error}") from None
    if threads := envs.get("MINIVLLM_CPU_THREADS"):
        try:
            extension.set_num_threads(int(threads))
        except ValueError:
            raise ValueError(f"MINIVLLM_CPU_THREADS={threads!r} must be a whole number, at least 1") from None


lib, _unavailable = _import_extension()


def why_not(spec: OpSpec) -> str | None:
    """Why the native kernels cannot serve `spec`: no extension, another device, or another dtype."""
    if _unavailable is not None:
        return _unavailable
    if spec.device != "cpu":
        return f"needs a CPU, got {spec.device}"
    if spec.dtype not in DTYPE_CODES:
        return f"no {spec.dtype} kernel"
    return None


def dtype_code(tensor: torch.Tensor) -> int:
    """The extension's code for a tensor's dtype.

    Raises:
        ValueError: the extension has no kernels for it.
    """
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"no native kernel for {tensor.dtype}; convert to float32, bfloat16 or float16")
    return code
