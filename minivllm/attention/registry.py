"""The attention backends there are, most preferred first, and the choice among them."""

from __future__ import annotations

import importlib

from minivllm.attention.backend import AttentionBackend, AttentionSpec
from minivllm.exceptions import ConfigError
from minivllm.logger import init_logger

logger = init_logger(__name__)

_BACKENDS = [
    "minivllm.attention.backends.cpu_native:CpuNativeBackend",
    "minivllm.attention.backends.triton:TritonBackend",
]


def select_backend(spec: AttentionSpec) -> AttentionBackend:
    """The first backend that serves `spec`.

    Raises:
        ConfigError: none does; the message holds each one's reason.
    """
    reasons = []
    for target in _BACKENDS:
        module, _, name = target.partition(":")
        backend_class = getattr(importlib.import_module(module), name)
        reason = backend_class.why_not(spec)
        if reason is None:
            backend = backend_class(spec)
            logger.info("attention backend: %s, layout %s", backend.name, backend.layout_id)
            return backend
        reasons.append(f"{backend_class.name} ({reason})")
    raise ConfigError(
        f"no attention backend fits this model: {', '.join(reasons)}; serve a model of another shape"
    )
