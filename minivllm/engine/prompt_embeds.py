"""A prompt given as vectors, checked: what passes can be run, and stands for as many tokens as it has rows.

Needs no torch: a tensor, if that is what is given, brings its own.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from minivllm.config.model import ModelConfig
from minivllm.exceptions import RequestError
from minivllm.messages.engine import EMBEDDING_DTYPES, PromptEmbeds
from minivllm.utils.torch_file import SavedTensor

if TYPE_CHECKING:
    import numpy as np


def error_of(what: str) -> RequestError:
    return RequestError(f"prompt_embeds {what}", param="prompt_embeds")


def check_taken(model: ModelConfig) -> None:
    """Raises RequestError where the operator has not asked for prompts of vectors."""
    if not model.enable_prompt_embeds:
        raise error_of("are not taken here; start the server with --enable-prompt-embeds")


def read_prompt_embeds(given: Any, hidden_size: int, max_model_len: int) -> PromptEmbeds:
    """given: a torch tensor, a numpy array or a `SavedTensor`, [num_tokens, hidden_size], perhaps with a 1 before it.

    Raises:
        RequestError: it is none of these, does not fit the model, or holds what is no finite number.
    """
    if isinstance(given, PromptEmbeds):
        check_prompt_embeds(given, hidden_size)
        return given
    num_tokens, dtype = shape_of(given, hidden_size)
    if num_tokens >= max_model_len:  # looked at before the data is: views of a few bytes may claim any size
        raise error_of(
            f"has {num_tokens} vectors, and the model's context of {max_model_len} must also hold the answer; send "
            "fewer, or raise --max-model-len"
        )
    embeds = PromptEmbeds(dtype, hidden_size, _bytes_of(given))
    check_prompt_embeds(embeds, hidden_size)
    return embeds


def shape_of(given: Any, hidden_size: int) -> tuple[int, str]:
    """How many tokens it stands for, and its dtype; its data is not looked at. Raises as `read_prompt_embeds`."""
    shape, dtype = getattr(given, "shape", None), str(getattr(given, "dtype", "")).removeprefix("torch.")
    if shape is None or not dtype:
        raise error_of(f"must be a tensor, not {type(given).__name__}")
    if dtype not in EMBEDDING_DTYPES:
        raise error_of(f"is of dtype {dtype}; {', '.join(EMBEDDING_DTYPES)} are read")
    rows = tuple(shape[1:]) if len(shape) == 3 and shape[0] == 1 else tuple(shape)
    if len(rows) != 2 or 0 in rows:
        raise error_of(f"has the shape {list(shape)}; it must be [tokens, {hidden_size}], with at least one token")
    if rows[1] != hidden_size:
        raise error_of(f"has vectors of {rows[1]} numbers; the model's hidden size is {hidden_size}")
    return rows[0], dtype


def _bytes_of(given: Any) -> bytes:
    if isinstance(given, SavedTensor):
        try:
            return given.data()
        except ValueError as error:
            raise error_of(f"cannot be read: {error}") from error
    import numpy as np  # the server's start does not wait for it

    if isinstance(given, np.ndarray):
        return np.ascontiguousarray(given, given.dtype.newbyteorder("<")).tobytes()
    if getattr(given, "is_sparse", False) or not hasattr(given, "data_ptr"):
        raise error_of(f"must be a dense tensor, not {type(given).__name__}")
    tensor = given.detach().cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def check_prompt_embeds(embeds: PromptEmbeds, hidden_size: int) -> None:
    """Those of a message that somebody else made. Raises as `read_prompt_embeds`."""
    if embeds.dtype not in EMBEDDING_DTYPES or embeds.hidden_size != hidden_size:
        raise error_of(f"has vectors of {embeds.hidden_size} {embeds.dtype}; the model's hidden size is {hidden_size}")
    if not embeds.data or len(embeds.data) % embeds.row_bytes:
        raise error_of(f"has {len(embeds.data)} bytes, which are no rows of {hidden_size} {embeds.dtype}")
    finite = _is_finite(embeds)
    if not finite.all():
        raise error_of(f"holds a number that is not finite, at position {int(finite.argmin()) // hidden_size}")


def _is_finite(embeds: PromptEmbeds) -> np.ndarray:
    """Of each number. In every float format an exponent of ones says that it is none."""
    import numpy as np

    width, exponent = {
        "float32": ("<u4", 0x7F800000), "float16": ("<u2", 0x7C00), "bfloat16": ("<u2", 0x7F80)
    }[embeds.dtype]  # fmt: skip
    return np.frombuffer(embeds.data, width) & np.array(exponent, width) != exponent
