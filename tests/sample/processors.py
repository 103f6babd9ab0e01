"""Logits processors as users write them; named by `tests.sample.processors:…`."""

from __future__ import annotations

import torch

from minivllm.logits_processors import BatchUpdate, LogitsProcessor, MoveDirectionality
from minivllm.sampling_params import SamplingParams


class Tracking(LogitsProcessor):
    """Follows the batch as the interface says, in the simplest way."""

    def __init__(self, config, device: torch.device, is_pin_memory: bool) -> None:
        self.requests: dict[int, tuple[SamplingParams, list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            del self.requests[index]
        for index, params, prompt, output in batch_update.added:
            self.requests[index] = (params, prompt, output)
        for old, new, how in batch_update.moved:
            assert how is MoveDirectionality.UNIDIRECTIONAL and new not in self.requests
            self.requests[new] = self.requests.pop(old)
        assert sorted(self.requests) == list(range(batch_update.batch_size))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class NthToken(Tracking):
    """`extra_args: {"tokens": […]}`: the answer is these tokens, and after them the last again."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        tokens = (sampling_params.extra_args or {}).get("tokens")
        if tokens is not None and not (isinstance(tokens, list) and tokens):
            raise ValueError("tokens must be a list of token ids")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, (params, _, output) in self.requests.items():
            tokens = (params.extra_args or {}).get("tokens")
            if tokens:
                logits[index] = float("-inf")
                logits[index, tokens[min(len(output), len(tokens) - 1)]] = 0.0
        return logits


class Sharpen(Tracking):
    """Halves the temperature again, in a new tensor."""

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return 2 * logits


class Follow(Tracking):
    """`extra_args: {"follow": k}`: favours tokens that all of the prompt and the output so far decide on."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, (params, prompt, output) in self.requests.items():
            factor = (params.extra_args or {}).get("follow")
            if factor:
                logits[index, (factor * sum(output) + sum(prompt)) % 7 :: 7] += 2.0
        return logits


class Broken(Tracking):
    """Raises for a batch in which somebody says so."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if any((params.extra_args or {}).get("break") for params, _, _ in self.requests.values()):
            raise ZeroDivisionError("as asked")
        return logits


class NoProcessor:
    """Is none."""
