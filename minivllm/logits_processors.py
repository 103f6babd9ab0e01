"""Logits processors of one's own: the class to derive from, and how it is found by name.

Owns the interface between a step's batch and such a class (vLLM's, method by method). Imports no torch: front ends
load the classes too, for `validate_params`.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from minivllm.exceptions import ConfigError
from minivllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

    from minivllm.config.engine import EngineConfig


class MoveDirectionality(Enum):
    """Whether a request moves to an empty index, or two change places."""

    UNIDIRECTIONAL = 0
    SWAP = 1


class AddedRequest(NamedTuple):
    """A request that joins the batch, perhaps with output already (it was preempted, or resent).

    output_token_ids grows as the request does: keep it, and it is up to date in every `apply`. A prompt given as
    embeddings has no tokens: [].
    """

    index: int
    sampling_params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]


@dataclass(frozen=True)
class BatchUpdate:
    """What changed since the last step, to be followed in this order: removed, added, moved.

    An added index that was taken replaces what was there. moved: (from, to, how). The batch holds the requests that
    get a token in this step; one that has none to get is removed, and added again when it has.
    """

    batch_size: int
    removed: Sequence[int] = ()
    added: Sequence[AddedRequest] = ()
    moved: Sequence[tuple[int, int, MoveDirectionality]] = ()


class LogitsProcessor(ABC):
    """Changes the logits of a batch. Named by `--logits-processors module:Class`; one object serves all requests."""

    @classmethod  # noqa: B027 (who has nothing to check leaves it)
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check a request before the engine sees it; what is raised is the client's error (400)."""

    @abstractmethod
    def __init__(self, config: EngineConfig, device: torch.device, is_pin_memory: bool) -> None:
        """Made once, by the worker. is_pin_memory: whether host buffers should be pinned."""

    @abstractmethod
    def is_argmax_invariant(self) -> bool:
        """True: the most likely token stays so. `apply` then comes after the temperature and spares greedy requests;
        otherwise it comes before the penalties."""

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each `apply`; None: the batch is the same, though its outputs have grown."""

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: [batch_size, vocab_size] float32, row i of the request at index i. In place, or a new tensor."""


def name_of(target: str | type) -> str:
    """The name by which another process finds a class.

    Raises:
        ConfigError: it could not.
    """
    if isinstance(target, type):
        target = f"{target.__module__}:{target.__qualname__}"
    module, colon, name = target.partition(":") if isinstance(target, str) else ("", "", "")
    if not (module and colon and name) or module == "__main__" or "<locals>" in name:
        raise ConfigError(
            f"logits_processors: {target!r} must be module:Class, or a class of a module that can be imported"
        )
    return target


def check_names(names: Iterable[str]) -> None:
    """Look for the modules without importing them.

    Raises:
        ConfigError: a name is no module:Class, or there is no such module.
    """
    for target in names:
        package = name_of(target).partition(":")[0].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"logits_processors: {target}: there is no module {package}; is it on PYTHONPATH?")


def load_logits_processors(names: Iterable[str] | None) -> list[type[LogitsProcessor]]:
    """The classes, in order; imports what they import.

    Raises:
        ConfigError: one cannot be imported, or is no LogitsProcessor.
    """
    return [_load(target) for target in names or ()]


def _load(target: str) -> type[LogitsProcessor]:
    module, _, name = name_of(target).partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # an import runs the module, which may raise anything
        raise ConfigError(
            f"logits_processors: {target} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, LogitsProcessor)):
        raise ConfigError(f"logits_processors: {target} is no subclass of minivllm.logits_processors.LogitsProcessor")
    return found
