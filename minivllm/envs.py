"""The environment variables minivllm reads: only what must be known before the arguments are.

`--help` prints this table. A value that cannot be parsed is an error, never a default.
"""

from __future__ import annotations

import os

VARIABLES = {
    "MINIVLLM_CPU_ISA": (
        "most the CPU kernels may use: avx2, avx512, avx512_vnni, avx512_bf16 or amx (default: the fastest it has)"
    ),
    "MINIVLLM_API_KEY": "bearer key of the API server, beside those of --api-key",
    "MINIVLLM_LOGGING_CONFIG_PATH": "what --log-config-file says when it is not given",
    "MINIVLLM_RUN_DIR": "where the private socket directory is made (default: the system's temporary directory)",
    "VLLM_API_KEY": "read like MINIVLLM_API_KEY when neither that nor --api-key is given",
    "VLLM_LOGGING_CONFIG_PATH": "read when neither --log-config-file nor MINIVLLM_LOGGING_CONFIG_PATH is given",
    "VLLM_SERVER_DEV_MODE": "1: as --enable-dev-endpoints",
}


def get(name: str) -> str | None:
    """The variable's value, or None. `name` must be listed in VARIABLES."""
    assert name in VARIABLES, name
    return os.environ.get(name) or None


def is_dev_mode() -> bool:
    """Whether VLLM_SERVER_DEV_MODE asks for the development endpoints."""
    return get("VLLM_SERVER_DEV_MODE") not in (None, "0")
