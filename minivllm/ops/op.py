"""How an operation picks its implementation: once, when a layer is built, and said in the log.

Every `ops/<op>.py` holds a plain-PyTorch `reference` (the specification, with shapes) and faster
implementations, most preferred first. `why_not(spec)` returns None, or the reason an
implementation cannot serve that spec, in words fit for a log line.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from minivllm.logger import init_logger

logger = init_logger(__name__)


@dataclass(frozen=True)
class OpSpec:
    """What an implementation is asked to serve: the device, the data type, and the op's own sizes."""

    device: str
    dtype: torch.dtype
    sizes: dict[str, int] = field(default_factory=dict, hash=False)


def always(spec: OpSpec) -> str | None:
    """The `why_not` of an implementation that serves every spec."""
    return None


class Impl(NamedTuple):
    """One implementation of an op and its reason not to serve a spec."""

    fn: Callable[..., Any] | str  # or "module:name" within `minivllm.ops`, imported when it is chosen
    why_not: Callable[[OpSpec], str | None] = always

    @property
    def name(self) -> str:
        return self.fn if isinstance(self.fn, str) else self.fn.__name__

    def load(self) -> Callable[..., Any]:
        if not isinstance(self.fn, str):
            return self.fn
        module, _, name = self.fn.partition(":")
        return getattr(importlib.import_module(f"minivllm.ops.{module}"), name)


class NoImplementation(ValueError):
    """Nothing serves a spec."""


class Op:
    """A named list of implementations, most preferred first."""

    def __init__(self, name: str, implementations: list[Impl]) -> None:
        self.name = name
        self.implementations = implementations
        self._logged: set[str] = set()

    def select(self, spec: OpSpec) -> Callable[..., Any]:
        """The first implementation that serves `spec`.

        Raises:
            NoImplementation: nothing fits; the message holds every implementation's reason.
        """
        reasons = []
        for impl in self.implementations:
            reason = impl.why_not(spec)
            if reason is None:
                self._log_choice(impl.name, reasons)
                return impl.load()
            reasons.append(f"{impl.name} ({reason})")
        raise NoImplementation(f"no implementation of {self.name} fits {spec}: {', '.join(reasons)}")

    def _log_choice(self, name: str, passed_over: list[str]) -> None:
        if name not in self._logged:
            self._logged.add(name)
            because = f"; passed over: {', '.join(passed_over)}" if passed_over else ""
            logger.debug("%s: %s%s", self.name, name, because)
