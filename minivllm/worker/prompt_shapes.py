"""The shapes of steps with prompts that are recorded (`graphs.py`): lengths are padded, so that few shapes serve all.

Rows are padded as far as they cost a linear layer nothing. Requests that are padded have no rows, and cost nothing.
"""

from __future__ import annotations

from minivllm.worker.capture_shapes import default_size

_MOST_TOKENS = 512  # what lies between the kernels of a larger step is a hundredth of it


class PromptShapes:
    def __init__(self, rows_at_once: int, max_num_tokens: int) -> None:
        """rows_at_once: of x, that a linear layer multiplies for the price of one."""
        self._rows_at_once = rows_at_once
        self._most_tokens = min(_MOST_TOKENS, max_num_tokens) // rows_at_once * rows_at_once

    def has(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens is recorded."""
        return num_tokens <= self._most_tokens

    def padded_tokens(self, num_tokens: int) -> int:
        return -(-num_tokens // self._rows_at_once) * self._rows_at_once

    def padded_reqs(self, num_reqs: int) -> int:
        return default_size(num_reqs)
