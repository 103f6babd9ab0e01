"""Token embedding: a gather. Tied embeddings gather from the packed LM head (`rows` in `ops/linear.py`)."""

from __future__ import annotations

import torch
from torch.nn import functional

from minivllm.ops import gpu, native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op


def reference(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight[ids]. ids: [T] int64; weight: [V, H]. Returns [T, H]; an id outside [0, V) raises IndexError."""
    return functional.embedding(ids, weight)


def cpu(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`reference` in C++: torch's own look-up could not be recorded (`ops/recording.py`)."""
    num_rows, width = weight.shape
    require("weight", weight, weight.dtype, (num_rows, width))
    require("ids", ids, torch.int64, ids.shape)
    out = torch.empty(ids.shape[0], width, dtype=weight.dtype)
    row_bytes = width * weight.element_size()
    native.lib.embedding(out.data_ptr(), weight.data_ptr(), num_rows, row_bytes, ids.data_ptr(), ids.shape[0])
    return out


IMPLEMENTATIONS = [
    Impl(cpu, why_not=native.why_not),
    Impl("triton.embedding:embedding", gpu.why_not),
    Impl(reference),
]
embedding = Op("embedding", IMPLEMENTATIONS)
