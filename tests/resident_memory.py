"""How much of a tensor the system has given memory for."""

from __future__ import annotations

import os

import numpy as np
import torch


def resident_bytes(tensor: torch.Tensor) -> int:
    """Of the pages that a tensor covers whole, those that have memory (proc(5), pagemap)."""
    page = os.sysconf("SC_PAGESIZE")
    first, last = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(8 * first)
        entries = np.frombuffer(pagemap.read(8 * (last - first)), np.uint64)
    return int((entries >> np.uint64(63)).sum()) * page
