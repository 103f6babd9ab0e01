"""What the rest of the engine may ask of the device it runs on. Owns the contract and the choice of a platform.

Nobody else asks for a device by name: a capability that is missing is None, or a method that says no.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from minivllm.config.cpu import CpuConfig
from minivllm.exceptions import ConfigError


class Platform(ABC):
    """A device, its memory and what it can do."""

    name: str
    device: str  # as torch spells it
    default_block_size: int  # tokens in a KV block
    block_size_multiple: int  # the kernels' KV tile
    supported_dtypes: tuple[torch.dtype, ...]
    graphs: Any = None  # captures and replays a step; None where there is no such thing

    @property
    @abstractmethod
    def numerics_id(self) -> str:
        """Device and instruction family in use: equal ids give equal bits."""

    @abstractmethod
    def memory_limit_bytes(self) -> int:
        """The most memory this process may ever use."""

    @abstractmethod
    def memory_available_bytes(self) -> int:
        """What could be allocated now without reaching the limit."""

    @abstractmethod
    def process_memory_bytes(self) -> int:
        """What this process holds now."""

    @abstractmethod
    def give_back(self, tensor: torch.Tensor) -> None:
        """Let the system have the memory under a tensor until it is written to again. Its place stays, what it holds is
        lost."""

    @abstractmethod
    def prepare(self, cpu: CpuConfig) -> None:
        """Set up the process once, before anything is computed.

        Raises:
            ConfigError: this machine has not the processors that are asked for.
        """

    def check_block_size(self, block_size: int) -> None:
        """Refuse a KV block that no kernel takes.

        Raises:
            ConfigError: it is not a positive multiple of the kernels' tile.
        """
        step = self.block_size_multiple
        if block_size <= 0 or block_size % step:
            raise ConfigError(
                f"--block-size {block_size} is not a multiple of {step}: attention reads the cache in tiles of "
                f"{step} tokens, which must not cross blocks; try {self.default_block_size}"
            )


def detect() -> Platform:
    """The platform of this machine. CUDA is not served yet: with or without a GPU, it is the CPU."""
    from minivllm.platforms.cpu import CpuPlatform

    return CpuPlatform()
