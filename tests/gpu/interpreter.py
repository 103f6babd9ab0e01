"""Triton's interpreter, so that kernels run on a CPU, with what it gets wrong put right.

It keeps bfloat16 and float8 as whole numbers, which it would multiply as such, truncates where cards round to
nearest, and makes a number of a truth value that meets a tensor of them.
Import this before any kernel: whether a kernel is interpreted is decided where it is defined.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype  # noqa: E402

_KEPT_AS_WHOLE_NUMBERS = {
    tl.bfloat16: (np.int16, torch.bfloat16, np.uint16),
    tl.float8e4nv: (np.uint8, torch.float8_e4m3fn, np.uint8),
}
_create_dot = InterpreterBuilder.create_dot
_check_handle = getattr(TensorHandle, "__post_init__", lambda self: None)


def _widened(handle: TensorHandle) -> TensorHandle:
    """In float32, if numpy does not know the type."""
    kept = _KEPT_AS_WHOLE_NUMBERS.get(handle.dtype.scalar)
    if kept is None:
        return handle
    whole, dtype, _ = kept
    numbers = torch.from_numpy(np.ascontiguousarray(handle.data).view(whole)).view(dtype)
    return TensorHandle(numbers.float().numpy().reshape(handle.data.shape), tl.float32)


def _dot(self, a, b, d, *rest):  # triton 3.6 … 3.9: (input_precision, max_num_imprecise_acc)
    return _create_dot(self, _widened(a), _widened(b), d, *rest)


def _cast(self, src, dst_type, *rest):
    wide = _widened(src)
    kept = _KEPT_AS_WHOLE_NUMBERS.get(dst_type.scalar)
    if kept is None:
        return TensorHandle(wide.data.astype(_get_np_dtype(dst_type)), dst_type.scalar)
    whole, dtype, stored = kept
    numbers = torch.from_numpy(np.ascontiguousarray(wide.data, dtype=np.float32)).to(dtype)
    bits = numbers.view(getattr(torch, np.dtype(whole).name)).numpy().view(stored)
    return TensorHandle(bits.reshape(wide.data.shape), dst_type.scalar)


def _check_truth(self):
    if self.data.dtype == bool:  # a comparison says it was the type of what was compared
        self.dtype = tl.int1
    _check_handle(self)


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    # The bounds of a loop: new numpy makes no number of an array of one, which triton 3.6 asks of it.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor
TensorHandle.__post_init__ = _check_truth
InterpreterBuilder.create_dot = _dot
for _name in (
    "cast_impl", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext",
    "create_fp_trunc", "create_fp_to_fp",
):  # fmt: skip
    setattr(InterpreterBuilder, _name, _cast)
