"""Token embedding: a gather. Tied embeddings gather from the packed LM head (`rows` in `ops/linear.py`)."""

from __future__ import annotations

import torch
from torch.nn import functional

from minivllm.ops import gpu
from minivllm.ops.op import Impl, Op


def reference(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight[ids]. ids: [T] int64; weight: [V, H]. Returns [T, H]; an id outside [0, V) raises IndexError."""
    return functional.embedding(ids, weight)


IMPLEMENTATIONS = [Impl("triton.embedding:embedding", gpu.why_not), Impl(reference)]
embedding = Op("embedding", IMPLEMENTATIONS)
