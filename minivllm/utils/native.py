"""The native extension, imported once, with the variable that tunes it applied. Needs no torch.

The only module that imports `minivllm._native`: what it says of instruction family and threads is what the
kernels use, whoever asks. How tensors are handed over is `ops/native.py`.
"""

from __future__ import annotations

from types import ModuleType

from minivllm import envs
from minivllm.exceptions import ConfigError


def _import_extension() -> tuple[ModuleType | None, str | None]:
    """The extension, or None; and why its kernels cannot be used, or None."""
    try:
        from minivllm import _native
    except ImportError as error:
        return None, f"the native extension is not built: {error}"
    _apply_environment(_native)
    if _native.isa() == "none":
        return _native, "no native kernel for this processor: x86-64 with AVX2 is needed"
    return _native, None


def _apply_environment(extension: ModuleType) -> None:
    """Honour the variable that lowers the instruction set."""
    if cap := envs.get("MINIVLLM_CPU_ISA"):
        try:
            extension.cap_isa(cap)
        except ValueError as error:
            raise ConfigError(f"MINIVLLM_CPU_ISA={cap!r}: {error}") from None


lib, unavailable = _import_extension()
