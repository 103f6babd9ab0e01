"""The worker's memory while it sleeps: what is given back to the system, and how it comes again.

A host gives back pages and keeps their addresses: the cache's at level 1, the weights' too at level 2, to be read
again. A device gives back both at either level; at level 1 the weights wait in the host's memory. What is captured or
recorded holds memory and what was true of the weights, and is the runner's to forget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minivllm.platforms.platform import DevicePlatform, Platform


class Sleeping:
    def __init__(
        self, platform: Platform, weights: list[torch.Tensor], caches: list[torch.Tensor], load: Callable[[], None]
    ) -> None:
        """load: reads the weights into the places they have."""
        self._platform, self._load = platform, load
        self._tensors = {"weights": list({id(each): each for each in weights}.values()), "kv_cache": caches}
        self._away: dict[str, Callable[[], None]] = {}  # by part what is given back: a call has its memory again
        self._on_host: list[tuple[torch.Tensor, torch.Tensor]] = []  # weights that are away, and copies of them

    @property
    def is_awake(self) -> bool:
        return not self._away

    @torch.inference_mode()
    def sleep(self, level: int) -> None:
        """Give memory back; may be called again, with another level."""
        if level >= 2:
            self._on_host.clear()
        elif isinstance(self._platform, DevicePlatform) and "weights" not in self._away:
            self._on_host = _copies_on_host(self._tensors["weights"], self._platform)
        if level >= 2 or self._on_host:
            self._give_back("weights")
        self._give_back("kv_cache")

    def _give_back(self, part: str) -> None:
        if part not in self._away:
            self._away[part] = self._platform.give_back(self._tensors[part])

    @torch.inference_mode()
    def wake_up(self, parts: Sequence[str]) -> list[str]:
        """Have memory again: the parts that were away. The cache's holds anything.

        Raises:
            ModelFilesError: the checkpoint is not what it was.
            EngineError: others have the memory. It may be called again after either.
        """
        woken = [part for part in parts if part in self._away]
        for part in woken:
            self._away[part]()
            if part == "weights":
                self._fill_weights()
            del self._away[part]
        return woken

    def _fill_weights(self) -> None:
        if not self._on_host:
            self._load()
        for tensor, copy in self._on_host:
            tensor.copy_(copy)
        self._on_host.clear()


def _copies_on_host(
    tensors: list[torch.Tensor], platform: DevicePlatform
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each with a copy in pinned memory."""
    copies = [(tensor, platform.new_pinned(tuple(tensor.shape), tensor.dtype)) for tensor in tensors]
    for tensor, copy in copies:
        copy.copy_(tensor, non_blocking=True)
    platform.record_event().synchronize()
    return copies
