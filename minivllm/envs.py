"""The environment variables minivllm reads: only what must be known before the arguments are.

`--help` prints this table. A value that cannot be parsed is an error, never a default.
"""

from __future__ import annotations

import os

VARIABLES = {
    "MINIVLLM_CPU_ISA": "most the CPU kernels may use: avx2, avx512 or amx (default: what the machine has)",
    "MINIVLLM_CPU_THREADS": "threads of the CPU kernels (default: the processors this process may use)",
    "MINIVLLM_API_KEY": "bearer key of the API server, beside those of --api-key",
    "MINIVLLM_RUN_DIR": "where the private socket directory is made (default: the system's temporary directory)",
}


def get(name: str) -> str | None:
    """The variable's value, or None. `name` must be listed in VARIABLES."""
    assert name in VARIABLES, name
    return os.environ.get(name) or None
