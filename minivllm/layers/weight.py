"""The tensors a checkpoint must hold, each with the layer's own way to take it in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Weight:
    """One expected tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    load_rows: Callable[[int, torch.Tensor], None]
    """(start, rows): take rows start, start + 1, … of the tensor, of any float dtype."""
    num_bytes: int = 0
    """In memory, once loaded; 0 for a number that is kept elsewhere."""
    tensors: tuple[torch.Tensor, ...] = ()
    """What it is part of; several weights may lie in one."""


def weight_of(name: str, tensor: torch.Tensor) -> Weight:
    """A weight that is kept as it is, converted to `tensor`'s dtype."""

    def load_rows(start: int, rows: torch.Tensor) -> None:
        tensor[start : start + rows.shape[0]] = rows

    return Weight(name, tuple(tensor.shape), load_rows, tensor.nbytes, (tensor,))


def under(prefix: str, weights: Iterable[Weight]) -> Iterable[Weight]:
    """The same weights, named below `prefix`."""
    return (replace(weight, name=f"{prefix}.{weight.name}") for weight in weights)
