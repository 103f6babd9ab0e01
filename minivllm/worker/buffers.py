"""A step's inputs on their way to the device: arrays that the host fills, and where the device reads them.

Where the device's memory is the host's, both are the same and nothing is copied. Elsewhere an upload copies what
changed into pinned memory and has the device fetch it while the host goes on. There are two such places, used in turn:
the host writes to one only when the device has fetched what lay there two steps ago.
"""

from __future__ import annotations

import numpy as np
import torch

from minivllm.platforms.platform import DevicePlatform, Event, Platform

_TURNS = 2


class Mirror:
    """`host` is written between uploads, `device` is what the model reads; it stays where it is."""

    def __init__(
        self, shape: tuple[int, ...], dtype: type, platform: DevicePlatform | None, staging: Staging
    ) -> None:
        self.host = np.zeros(shape, dtype)
        self.device = torch.from_numpy(self.host)
        self._staging = staging
        self._pinned: list[torch.Tensor] = []
        if platform is not None:
            kind = self.device.dtype
            self._pinned = [platform.new_pinned(shape, kind) for _ in range(_TURNS)]
            self.device = torch.zeros(shape, dtype=kind, device=platform.device)

    def upload(self, num_rows: int) -> None:
        """Have the device fetch the first rows, between the staging's `begin` and `end`."""
        if self._pinned and num_rows:
            pinned = self._pinned[self._staging.turn][:num_rows]
            pinned.numpy()[...] = self.host[:num_rows]
            self.device[:num_rows].copy_(pinned, non_blocking=True)


class Staging:
    """Makes mirrors, and knows whose turn it is."""

    def __init__(self, platform: Platform | None = None) -> None:
        """platform: None where the device's memory is the host's."""
        self._platform = platform if isinstance(platform, DevicePlatform) else None
        self.turn = 0
        self._fetched: list[Event | None] = [None] * _TURNS

    @property
    def copies(self) -> bool:
        """Whether the device has memory of its own."""
        return self._platform is not None

    def mirror(self, shape: tuple[int, ...], dtype: type) -> Mirror:
        return Mirror(shape, dtype, self._platform, self)

    def send(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        """The same on the device, for what has no place of its own there because its size is never the same.

        The device fetches it from pinned memory while the host goes on. That memory is let go of at once: whoever
        gives it out again knows what is still being fetched (torch's allocator does).
        """
        if isinstance(values, np.ndarray):
            values = torch.from_numpy(values)
        if self._platform is None:
            return values
        pinned = self._platform.new_pinned(tuple(values.shape), values.dtype)
        pinned.copy_(values)
        place = torch.empty(values.shape, dtype=values.dtype, device=self._platform.device)
        return place.copy_(pinned, non_blocking=True)

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """The same in the host's memory, which has it when an event recorded from now on has come."""
        if self._platform is None:
            return values
        pinned = self._platform.new_pinned(tuple(values.shape), values.dtype)
        pinned.copy_(values, non_blocking=True)
        return pinned

    def begin(self) -> None:
        """Before the first upload of a step."""
        self.turn = (self.turn + 1) % _TURNS
        fetched = self._fetched[self.turn]
        if fetched is not None:
            fetched.synchronize()

    def end(self) -> None:
        """After the last."""
        if self._platform is not None:
            self._fetched[self.turn] = self._platform.record_event()
